"""The bundled data set `scenes` and the two small models trained on it, for demonstrations that show real pictures."""
