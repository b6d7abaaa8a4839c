"""The bundled data set `scenes` and the two small models trained on it, so that every demonstration shows real pictures."""
