// AVX-512 for one token and long rows: one row of the weight at a time.
//
// A step is 512 columns: 64 * bits bytes, widened into eight registers of 64 codes. Which columns share a register is what
// is cheapest to widen; inputs are put in the same order once a call. Every 32-bit lane of a product sums over neighbouring
// columns, so that sums over groups of 32 are sums over neighbouring lanes, and sixteen groups fill a register.
#include "avx512.h"

#if defined(ZSAQ_AVX512)

namespace zsaq {

namespace {

constexpr int kRegisters = 8;  // of 64 codes in a step

// Every second byte of two registers, from the first or the second on.
ZSAQ_INLINE __m512i every_second(__m512i a, __m512i b, int from) {
  const __m512i mask = _mm512_set1_epi16(0xff);
  const __m512i low = from ? _mm512_srli_epi16(a, 8) : _mm512_and_si512(a, mask);
  const __m512i high = from ? _mm512_srli_epi16(b, 8) : _mm512_and_si512(b, mask);
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packus_epi16(low, high));
}

// Of codes of 4 bits: byte j of a register of packed codes holds columns 2 j and 2 j + 1.
ZSAQ_TARGET void arrange4(const uint8_t* codes, int64_t padded, uint8_t* out) {
  for (int64_t i = 0; i < padded; i += 128) {
    const __m512i a = _mm512_loadu_si512(codes + i), b = _mm512_loadu_si512(codes + i + 64);
    _mm512_storeu_si512(out + i, every_second(a, b, 0));
    _mm512_storeu_si512(out + i + 64, every_second(a, b, 1));
  }
}

// Of 3 bits: three bytes hold eight columns, the first four of which go into one register.
ZSAQ_TARGET void arrange3(const uint8_t* codes, int64_t padded, uint8_t* out) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  for (int64_t i = 0; i < padded; i += 128) {
    const __m512i a = _mm512_loadu_si512(codes + i), b = _mm512_loadu_si512(codes + i + 64);
    _mm512_storeu_si512(out + i, _mm512_permutex2var_epi32(a, even, b));
    _mm512_storeu_si512(out + i + 64, _mm512_permutex2var_epi32(a, odd, b));
  }
}

// Of 2 bits: byte j holds columns 4 j to 4 j + 3.
ZSAQ_TARGET void arrange2(const uint8_t* codes, int64_t padded, uint8_t* out) {
  for (int64_t i = 0; i < padded; i += 256) {
    __m512i v[4];
    for (int k = 0; k < 4; ++k) v[k] = _mm512_loadu_si512(codes + i + 64 * k);
    for (int from = 0; from < 2; ++from) {
      const __m512i a = every_second(v[0], v[1], from), b = every_second(v[2], v[3], from);
      _mm512_storeu_si512(out + i + 64 * from, every_second(a, b, 0));
      _mm512_storeu_si512(out + i + 64 * (2 + from), every_second(a, b, 1));
    }
  }
}

// `BYTES` packed codes from `p` on. Not FULL: of which `left` belong to the row; what is beyond reads as zero.
template <bool FULL, int BYTES>
ZSAQ_INLINE __m512i read(const uint8_t* p, int64_t left) {
  if constexpr (FULL && BYTES == 64) return _mm512_loadu_si512(p);
  const int64_t count = FULL || left > BYTES ? BYTES : left;
  return count <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(~0ULL >> (64 - count), p);
}

// A step of codes from `p` on, of which `left` bytes belong to the row. Codes of 8 bits beyond it are zero less no offset.
template <int BITS, bool FULL>
ZSAQ_INLINE void widen_step(const uint8_t* p, int64_t left, __m512i* c) {
  constexpr int kBytes = block_bytes(BITS);
  for (int b = 0; b < kRegisters / planes(BITS); ++b) {
    const int64_t here = left - kBytes * b;
    __m512i v = read<FULL, kBytes>(p + kBytes * b, here);
    if constexpr (BITS == 3) v = spread3(v);
    if constexpr (BITS == 8) {
      const __mmask64 inside = FULL || here >= 64 ? ~0ULL : here > 0 ? ~0ULL >> (64 - here) : 0;
      v = _mm512_maskz_add_epi8(inside, v, _mm512_set1_epi8(static_cast<char>(0x80)));
    }
    widen<BITS>(v, c + planes(BITS) * b);
  }
}

// Sums of neighbouring lanes, those of `a` before those of `b`.
ZSAQ_INLINE __m512i pair_sums(__m512i a, __m512i b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
}

// sum (q - z) c of the lanes of a step: one register for each `planes` of codes, of which the first `used` hold any.
template <int BITS>
ZSAQ_INLINE void products(const __m512i* c, const __m512i* total, const uint8_t* q, __m512i zero, int used, __m512i* s) {
  constexpr int P = planes(BITS);
  for (int i = 0; i < kRegisters / P; ++i) {
    if (i >= used) {
      s[i] = _mm512_setzero_si512();
      continue;
    }
    __m512i sum = _mm512_setzero_si512();
    for (int p = 0; p < P; ++p) sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(q + 64 * (i * P + p)), c[i * P + p]);
    s[i] = _mm512_sub_epi32(sum, _mm512_dpbusd_epi32(_mm512_setzero_si512(), zero, total[i]));
  }
}

template <int BITS>
ZSAQ_INLINE void totals(const __m512i* c, __m512i* total) {
  constexpr int P = planes(BITS);
  for (int i = 0; i < kRegisters / P; ++i) {
    total[i] = c[i * P];
    for (int p = 1; p < P; ++p) total[i] = _mm512_add_epi8(total[i], c[i * P + p]);
  }
}

// The sums over the 16 groups of 32 columns of a step.
template <int BITS>
ZSAQ_INLINE __m512i group_sums(__m512i* s) {
  for (int n = kRegisters / planes(BITS); n > 1; n /= 2)
    for (int i = 0; i < n / 2; ++i) s[i] = pair_sums(s[2 * i], s[2 * i + 1]);
  return s[0];
}

ZSAQ_INLINE __m512 scales(const void* values, int64_t i, __mmask16 mask, int32_t type) {
  if (type == ZSAQ_FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(values) + i);
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(values) + i));
}

// What sixteen groups add to the partial sums. See layout.h.
ZSAQ_INLINE __m512 add_groups(const Weight& weight, const Token& token, int64_t first, int64_t g, __m512i s, __m512 a) {
  const ZsaqWeight& layer = *weight.layer;
  const int64_t left = weight.groups - g;
  const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
  if (layer.shift_type == ZSAQ_SYMMETRIC) {
    const __m512i zero = _mm512_set1_epi32(weight.symmetric_zero);
    s = _mm512_sub_epi32(s, _mm512_mullo_epi32(zero, _mm512_loadu_si512(token.sums + g)));
  } else if (layer.shift_type == ZSAQ_ZERO_POINT) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(layer.shift) + first + g);
    const __m512i zero = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(offset_of(layer.bits)));
    s = _mm512_sub_epi32(s, _mm512_mullo_epi32(zero, _mm512_loadu_si512(token.sums + g)));
  }
  const __m512 scale = scales(layer.scale, first + g, mask, layer.scale_type);
  a = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(s), a);
  if (layer.shift_type == ZSAQ_MINIMUM) {
    __m512 minimum = scales(layer.shift, first + g, mask, layer.scale_type);
    if (layer.bits == 8) minimum = _mm512_fmadd_ps(_mm512_set1_ps(128.0f), scale, minimum);
    a = _mm512_fmadd_ps(minimum, _mm512_loadu_ps(token.float_sums + g), a);
  }
  return a;
}

ZSAQ_INLINE float sum_lanes(__m512 a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

// One row of the weight and a token. GROUPS: of 32 columns; else one.
template <int BITS, bool GROUPS>
struct Row {
  static constexpr int kSums = kRegisters / planes(BITS);  // registers of products
  const Weight& weight;
  const Token& token;
  const uint8_t* codes;
  const int64_t first;
  __m512 a;
  __m512i held;

  template <bool FULL>
  ZSAQ_INLINE void take(int64_t step) {
    __m512i c[kRegisters], total[kSums], s[kSums];
    const int64_t at = step * 64 * BITS, left = weight.layer->columns - step * kStep;
    const int used = FULL ? kSums : static_cast<int>((left * kSums + kStep - 1) / kStep);
    widen_step<BITS, FULL>(codes + at, weight.row_bytes - at, c);
    totals<BITS>(c, total);
    products<BITS>(c, total, token.codes + step * kStep, _mm512_set1_epi8(static_cast<char>(token.zero)), used, s);
    if constexpr (GROUPS)
      a = add_groups(weight, token, first, step * kLanes, group_sums<BITS>(s), a);
    else
      for (int i = 0; i < kSums; ++i) held = _mm512_add_epi32(held, s[i]);
  }

  ZSAQ_INLINE float run() {
    a = _mm512_setzero_ps();
    held = _mm512_setzero_si512();
    const int64_t columns = weight.layer->columns, whole = columns / kStep;
    for (int64_t step = 0; step < whole; ++step) take<true>(step);
    if (columns % kStep) take<false>(whole);
    if constexpr (!GROUPS) a = add_groups(weight, token, first, 0, _mm512_maskz_set1_epi32(1, _mm512_reduce_add_epi32(held)), a);
    return sum_lanes(a);
  }
};

template <int BITS, bool GROUPS>
ZSAQ_TARGET void rows_of(const Weight& weight, const Token* token, int64_t, int64_t from, int64_t to, float* sums) {
  for (int64_t row = from; row < to; ++row)
    sums[row - from] = Row<BITS, GROUPS>{weight, *token, weight.codes(row), weight.first(row), {}, {}}.run();
}

template <int BITS>
RowsFunction choose(const Weight& weight) {
  return weight.groups == 1 ? rows_of<BITS, false> : rows_of<BITS, true>;
}

}  // namespace

bool avx512_row_kernel(const Weight& weight, Kernel* kernel) {
  const ZsaqWeight& layer = *weight.layer;
  const bool is_long = layer.columns >= (layer.bits == 8 ? 512 : 1024);  // measured
  if (!is_long || (weight.groups > 1 && layer.group != 32)) return false;
  kernel->at_a_time = 32;
  switch (layer.bits) {
    case 2: kernel->arrange = arrange2; kernel->rows = choose<2>(weight); return true;
    case 3: kernel->arrange = arrange3; kernel->rows = choose<3>(weight); return true;
    case 4: kernel->arrange = arrange4; kernel->rows = choose<4>(weight); return true;
    case 8: kernel->arrange = nullptr; kernel->rows = choose<8>(weight); return true;
    default: return false;
  }
}

}  // namespace zsaq

#endif
