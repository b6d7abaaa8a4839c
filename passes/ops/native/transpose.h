// Square transposition in registers, for vectors of any power-of-two length.
#pragma once

#include <utility>

namespace hasten {

#if defined(__clang__) || __GNUC__ >= 12
template <int L, int S, class V, int... K>
V upper_of(V a, V b, std::integer_sequence<int, K...>) {
  return __builtin_shufflevector(a, b, ((K & S) ? L + K - S : K)...);
}
template <int L, int S, class V, int... K>
V lower_of(V a, V b, std::integer_sequence<int, K...>) {
  return __builtin_shufflevector(a, b, ((K & S) ? L + K : K + S)...);
}
// Exchange blocks of S rows with blocks of S columns, then larger blocks.
template <int L, int S = 1, class V>
inline void transpose_rows(V* r) {
  if constexpr (S < L) {
    constexpr auto lanes = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if ((i & S) == 0) {
        const V a = r[i], b = r[i + S];
        r[i] = upper_of<L, S>(a, b, lanes);
        r[i + S] = lower_of<L, S>(a, b, lanes);
      }
    transpose_rows<L, 2 * S>(r);
  }
}
#else
template <int L, class V>
inline void transpose_rows(V* r) {
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < i; ++j) {
      const float kept = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = kept;
    }
}
#endif

}  // namespace hasten
