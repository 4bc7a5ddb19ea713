// What the kernels for AVX-512 with VNNI and VBMI share.
#pragma once
#include "layout.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define ZSAQ_AVX512 1
#define ZSAQ_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bitalg,f16c,fma")))
#define ZSAQ_INLINE ZSAQ_TARGET __attribute__((always_inline)) inline

namespace zsaq {

// Packed codes are read 64 bytes at a time, 48 at 3 bits.
constexpr int block_bytes(int bits) { return bits == 3 ? 48 : 64; }

// A register of packed codes is widened into as many of bytes.
constexpr int planes(int bits) { return bits == 2 ? 4 : bits == 8 ? 1 : 2; }

// Of 3 bits: three bytes, eight codes, to each 32-bit word.
ZSAQ_INLINE __m512i spread3(__m512i v) {
  alignas(64) static const uint8_t bytes[64] = {0,  1,  2,  2,  3,  4,  5,  5,  6,  7,  8,  8,  9,  10, 11, 11,
                                                12, 13, 14, 14, 15, 16, 17, 17, 18, 19, 20, 20, 21, 22, 23, 23,
                                                24, 25, 26, 26, 27, 28, 29, 29, 30, 31, 32, 32, 33, 34, 35, 35,
                                                36, 37, 38, 38, 39, 40, 41, 41, 42, 43, 44, 44, 45, 46, 47, 47};
  return _mm512_permutexvar_epi8(_mm512_load_si512(bytes), v);
}

// c: `planes` registers. At 2 and 4 bits register p has the p-th code of each byte, at 3 bits (`spread3`) the first and the
// last four codes of each word; 8 bits are taken as they are.
template <int BITS>
ZSAQ_INLINE void widen(__m512i v, __m512i* c) {
  const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
  if constexpr (BITS == 8) {
    c[0] = v;
  } else if constexpr (BITS == 3) {
    c[0] = _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2926232009060300LL), v), mask);
    c[1] = _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x35322f2c15120f0cLL), v), mask);
  } else {
    c[0] = _mm512_and_si512(v, mask);
    for (int p = 1; p < planes(BITS); ++p) c[p] = _mm512_and_si512(_mm512_srli_epi16(v, BITS * p), mask);
  }
}

// One token and long rows: see avx512_row.cpp.
bool avx512_row_kernel(const Weight&, Kernel*);

}  // namespace zsaq

#endif
