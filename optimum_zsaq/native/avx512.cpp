// AVX-512 with VNNI and VBMI: codes stay packed in memory and are widened in registers.
//
// A step is 512 columns of one row: 64 * bits bytes, widened into eight registers of 64 codes. Which columns share a
// register is what is cheapest to widen; inputs are put in the same order once a call. Every 32-bit lane of a product then
// sums over neighbouring columns, so that sums over groups are sums over neighbouring lanes.
#include "layout.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define ZSAQ_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bitalg,f16c,fma")))
#define ZSAQ_INLINE ZSAQ_TARGET __attribute__((always_inline)) inline

namespace zsaq {

namespace {

constexpr int kRegisters = 8;  // of 64 codes in a step
constexpr int kTogether = 4;   // tokens that share a widened step

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

template <int BITS, bool FULL>
struct Widen;

template <bool FULL>
struct Widen<2, FULL> {
  static ZSAQ_INLINE void step(const uint8_t* p, int64_t left, __m512i* c) {
    const __m512i mask = _mm512_set1_epi8(3);
    for (int b = 0; b < 2; ++b) {
      const __m512i v = read<FULL, 64>(p + 64 * b, left - 64 * b);
      c[4 * b] = _mm512_and_si512(v, mask);
      c[4 * b + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 2), mask);
      c[4 * b + 2] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
      c[4 * b + 3] = _mm512_and_si512(_mm512_srli_epi16(v, 6), mask);
    }
  }
};

template <bool FULL>
struct Widen<3, FULL> {
  static ZSAQ_INLINE void step(const uint8_t* p, int64_t left, __m512i* c) {
    // three bytes, eight codes, to each 32-bit lane
    alignas(64) static const uint8_t spread[64] = {0,  1,  2,  2,  3,  4,  5,  5,  6,  7,  8,  8,  9,  10, 11, 11,
                                                   12, 13, 14, 14, 15, 16, 17, 17, 18, 19, 20, 20, 21, 22, 23, 23,
                                                   24, 25, 26, 26, 27, 28, 29, 29, 30, 31, 32, 32, 33, 34, 35, 35,
                                                   36, 37, 38, 38, 39, 40, 41, 41, 42, 43, 44, 44, 45, 46, 47, 47};
    const __m512i index = _mm512_load_si512(spread), mask = _mm512_set1_epi8(7);
    const __m512i low = _mm512_set1_epi64(0x2926232009060300LL), high = _mm512_set1_epi64(0x35322f2c15120f0cLL);
    for (int b = 0; b < 4; ++b) {
      const __m512i v = _mm512_permutexvar_epi8(index, read<FULL, 48>(p + 48 * b, left - 48 * b));
      c[2 * b] = _mm512_and_si512(_mm512_multishift_epi64_epi8(low, v), mask);
      c[2 * b + 1] = _mm512_and_si512(_mm512_multishift_epi64_epi8(high, v), mask);
    }
  }
};

template <bool FULL>
struct Widen<4, FULL> {
  static ZSAQ_INLINE void step(const uint8_t* p, int64_t left, __m512i* c) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int b = 0; b < 4; ++b) {
      const __m512i v = read<FULL, 64>(p + 64 * b, left - 64 * b);
      c[2 * b] = _mm512_and_si512(v, mask);
      c[2 * b + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    }
  }
};

template <bool FULL>
struct Widen<8, FULL> {
  static ZSAQ_INLINE void step(const uint8_t* p, int64_t left, __m512i* c) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int b = 0; b < 8; ++b) {
      const int64_t here = left - 64 * b;
      const __mmask64 inside = FULL || here >= 64 ? ~0ULL : here > 0 ? ~0ULL >> (64 - here) : 0;
      c[b] = _mm512_maskz_add_epi8(inside, read<FULL, 64>(p + 64 * b, here), flip);
    }
  }
};

// Sums of neighbouring lanes, those of `a` before those of `b`.
ZSAQ_INLINE __m512i pair_sums(__m512i a, __m512i b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
}

// How many registers have the codes of the same columns, each a part of them.
constexpr int planes(int bits) { return bits == 2 ? 4 : bits == 8 ? 1 : 2; }

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

// One row of the weight and some tokens. LEVELS: groups are of 32 << LEVELS columns; -1: one group.
template <int BITS, int LEVELS, int COUNT>
struct Row {
  static constexpr int kSums = kRegisters / planes(BITS);       // registers of products
  static constexpr int kHeld = LEVELS > 0 ? 1 << LEVELS : 1;  // steps that make sixteen groups
  const Weight& weight;
  const Token* tokens;
  const uint8_t* codes;
  const int64_t first, steps;
  __m512 a[COUNT];
  __m512i held[COUNT][kHeld];

  template <bool FULL>
  ZSAQ_INLINE void take(int64_t step) {
    __m512i c[kRegisters], total[kSums], s[kSums];
    const int64_t at = step * 64 * BITS, left = weight.layer->columns - step * kStep;
    const int used = FULL ? kSums : static_cast<int>((left * kSums + kStep - 1) / kStep);
    Widen<BITS, FULL>::step(codes + at, weight.row_bytes - at, c);
    totals<BITS>(c, total);
    for (int t = 0; t < COUNT; ++t) {
      const Token& token = tokens[t];
      const __m512i zero = _mm512_set1_epi8(static_cast<char>(token.zero));
      products<BITS>(c, total, token.codes + step * kStep, zero, used, s);
      if constexpr (LEVELS < 0) {
        for (int i = 0; i < kSums; ++i) held[t][0] = _mm512_add_epi32(held[t][0], s[i]);
      } else if constexpr (LEVELS == 0) {
        a[t] = add_groups(weight, token, first, step * kLanes, group_sums<BITS>(s), a[t]);
      } else {
        held[t][step % kHeld] = group_sums<BITS>(s);
        if ((step + 1) % kHeld == 0 || step + 1 == steps) {
          for (int n = kHeld; n > 1; n /= 2)
            for (int i = 0; i < n / 2; ++i) held[t][i] = pair_sums(held[t][2 * i], held[t][2 * i + 1]);
          a[t] = add_groups(weight, token, first, step / kHeld * kLanes, held[t][0], a[t]);
          for (auto& h : held[t]) h = _mm512_setzero_si512();
        }
      }
    }
  }

  ZSAQ_INLINE void run(float* sums, int64_t width) {
    for (int t = 0; t < COUNT; ++t) {
      a[t] = _mm512_setzero_ps();
      for (auto& h : held[t]) h = _mm512_setzero_si512();
    }
    const int64_t whole = weight.layer->columns / kStep;
    for (int64_t step = 0; step < whole; ++step) take<true>(step);
    if (whole < steps) take<false>(whole);
    for (int t = 0; t < COUNT; ++t) {
      if constexpr (LEVELS < 0) {
        const __m512i s = _mm512_maskz_set1_epi32(1, _mm512_reduce_add_epi32(held[t][0]));
        a[t] = add_groups(weight, tokens[t], first, 0, s, a[t]);
      }
      sums[t * width] = sum_lanes(a[t]);
    }
  }
};

template <int BITS, int LEVELS, int COUNT>
ZSAQ_INLINE void one_row(const Weight& weight, const Token* tokens, int64_t row, float* sums, int64_t width) {
  const int64_t steps = (weight.layer->columns + kStep - 1) / kStep;
  Row<BITS, LEVELS, COUNT> one{weight, tokens, weight.codes(row), weight.first(row), steps, {}, {}};
  one.run(sums, width);
}

template <int BITS, int LEVELS>
ZSAQ_TARGET void few_tokens(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  const int64_t width = to - from;
  for (int64_t row = from; row < to; ++row, ++sums) {
    int64_t t = 0;
    for (; t + kTogether <= count; t += kTogether)
      one_row<BITS, LEVELS, kTogether>(weight, tokens + t, row, sums + t * width, width);
    for (; t < count; ++t) one_row<BITS, LEVELS, 1>(weight, tokens + t, row, sums + t * width, width);
  }
}

// Many tokens: 32 rows are widened into the cache, four codes of each row side by side, and multiplied by tile of tokens.

constexpr int kBlock = 32;           // rows of the weight
constexpr int kQuads = kStep / 4;    // of four codes, in a step
constexpr int kTile = 4, kTileOfOne = 8;  // tokens; more where all columns are one group
constexpr int64_t kManyTokens = 12;  // from here on widening into the cache pays

struct Block {
  std::vector<int8_t> codes;        // (steps, kQuads, kBlock, 4)
  std::vector<int32_t> sums;        // (groups padded to kLanes, kBlock): of codes; in groups of up to 128 as float
  std::vector<int32_t> zeros;       // zero points less OFFSET
  std::vector<float> scales, minima;
  int8_t rows[16][kStep];
};

// Sixteen registers of sixteen 32-bit lanes, transposed.
ZSAQ_INLINE void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// Scales, minima or zero points of sixteen rows as (groups, kBlock).
template <typename Load>
ZSAQ_INLINE void by_group(const Weight& weight, int64_t row, int64_t to, void* out, Load load_some) {
  __m512i r[16];
  for (int64_t g = 0; g < weight.groups; g += kLanes) {
    const int64_t left = weight.groups - g;
    const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    for (int i = 0; i < 16; ++i) r[i] = row + i < to ? load_some(weight.first(row + i) + g, mask) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<int32_t*>(out) + (g + i) * kBlock, r[i]);
  }
}

// The quads of group t of 32 columns in a step: P planes of 8 / P neighbouring lanes.
template <int BITS>
constexpr int quad(int t, int k) {
  constexpr int P = planes(BITS), L = 8 / P, each = 16 / L;
  return (t / each * P + k / L) * 16 + t % each * L + k % L;
}

template <int BITS, int LEVELS>
ZSAQ_TARGET void fill(const Weight& weight, int64_t from, int64_t to, Block* block) {
  const ZsaqWeight& layer = *weight.layer;
  const int64_t steps = (layer.columns + kStep - 1) / kStep, groups = (weight.groups + kLanes - 1) / kLanes * kLanes;
  block->codes.resize(steps * kStep * kBlock);
  block->sums.assign(groups * kBlock, 0);
  block->scales.resize(groups * kBlock);
  if (layer.shift_type == ZSAQ_MINIMUM) block->minima.resize(groups * kBlock);
  if (layer.shift_type == ZSAQ_ZERO_POINT) block->zeros.resize(groups * kBlock);
  for (int half = 0; half < 2; ++half) {
    const int64_t row = from + 16 * half;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t at = step * 64 * BITS;
      __m512i c[kRegisters];
      for (int i = 0; i < 16; ++i) {
        for (auto& register_ : c) register_ = _mm512_setzero_si512();
        if (row + i < to) {
          const uint8_t* codes = weight.codes(row + i) + at;
          if (step < layer.columns / kStep)
            Widen<BITS, true>::step(codes, weight.row_bytes - at, c);
          else
            Widen<BITS, false>::step(codes, weight.row_bytes - at, c);
        }
        for (int p = 0; p < kRegisters; ++p) _mm512_storeu_si512(block->rows[i] + 64 * p, c[p]);
      }
      for (int p = 0; p < kRegisters; ++p) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(block->rows[i] + 64 * p);
        transpose(r);
        int8_t* out = block->codes.data() + ((step * kQuads + p * 16) * kBlock + 16 * half) * 4;
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * kBlock * 4, r[i]);
      }
      for (int t = 0; t < kLanes; ++t) {
        const int64_t g = LEVELS < 0 ? 0 : (step * kLanes + t) >> (LEVELS < 0 ? 0 : LEVELS);
        if (g >= weight.groups) break;
        int32_t* into = block->sums.data() + g * kBlock + 16 * half;
        __m512i sum = _mm512_loadu_si512(into);
        for (int k = 0; k < 8; ++k) {
          const int8_t* codes = block->codes.data() + ((step * kQuads + quad<BITS>(t, k)) * kBlock + 16 * half) * 4;
          sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(codes));
        }
        _mm512_storeu_si512(into, sum);
      }
    }
    if (LEVELS >= 0)
      for (int64_t g = 0; g < weight.groups; ++g) {
        int32_t* sums = block->sums.data() + g * kBlock + 16 * half;
        _mm512_storeu_ps(sums, _mm512_cvtepi32_ps(_mm512_loadu_si512(sums)));
      }
    const int32_t type = layer.scale_type;
    by_group(weight, row, to, block->scales.data() + 16 * half, [&](int64_t i, __mmask16 mask) ZSAQ_TARGET {
      return _mm512_castps_si512(scales(layer.scale, i, mask, type));
    });
    if (layer.shift_type == ZSAQ_MINIMUM)
      by_group(weight, row, to, block->minima.data() + 16 * half, [&](int64_t i, __mmask16 mask) ZSAQ_TARGET {
        __m512 minimum = scales(layer.shift, i, mask, type);
        if (BITS == 8) minimum = _mm512_fmadd_ps(_mm512_set1_ps(128.0f), scales(layer.scale, i, mask, type), minimum);
        return _mm512_castps_si512(minimum);
      });
    if (layer.shift_type == ZSAQ_ZERO_POINT)
      by_group(weight, row, to, block->zeros.data() + 16 * half, [&](int64_t i, __mmask16 mask) ZSAQ_TARGET {
        const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(layer.shift) + i);
        return _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(offset_of(BITS)));
      });
  }
}

// sum (q - z) (c - zero) of sixteen rows, from sum q c. In groups of up to 128 columns all of it is below 2^24, and exact
// in float, which is faster.
template <int LEVELS, int SHIFT>
ZSAQ_INLINE __m512 whole_sums(const Weight& weight, const Block& block, const Token& token, int64_t g, int64_t at, __m512i s) {
  const __m512i sums = _mm512_loadu_si512(block.sums.data() + at);
  if constexpr (LEVELS < 0) {
    s = _mm512_sub_epi32(s, _mm512_mullo_epi32(_mm512_set1_epi32(token.zero), sums));
    if (SHIFT == ZSAQ_SYMMETRIC)
      s = _mm512_sub_epi32(s, _mm512_set1_epi32(weight.symmetric_zero * token.sums[g]));
    else if (SHIFT == ZSAQ_ZERO_POINT)
      s = _mm512_sub_epi32(s, _mm512_mullo_epi32(_mm512_loadu_si512(block.zeros.data() + at), _mm512_set1_epi32(token.sums[g])));
    return _mm512_cvtepi32_ps(s);
  }
  __m512 f = _mm512_cvtepi32_ps(s);
  f = _mm512_fnmadd_ps(_mm512_set1_ps(static_cast<float>(token.zero)), _mm512_castsi512_ps(sums), f);
  if (SHIFT == ZSAQ_SYMMETRIC)
    f = _mm512_sub_ps(f, _mm512_set1_ps(static_cast<float>(weight.symmetric_zero) * token.float_sums[g]));
  else if (SHIFT == ZSAQ_ZERO_POINT)
    f = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(block.zeros.data() + at)), _mm512_set1_ps(token.float_sums[g]), f);
  return f;
}

// Tokens times a block, into sums (tokens, width).
template <int BITS, int LEVELS, int SHIFT, int COUNT>
ZSAQ_INLINE void tile(const Weight& weight, const Block& block, const Token* tokens, int64_t width, float* sums) {
  const ZsaqWeight& layer = *weight.layer;
  const int64_t parts = (layer.columns + 31) / 32;
  const int64_t each = LEVELS < 0 ? parts : int64_t{1} << (LEVELS < 0 ? 0 : LEVELS);  // parts of 32 columns in a group
  constexpr bool kOne = LEVELS < 0;  // one group, whose sum needs no others beside it
  alignas(64) float a[kOne ? 1 : kLanes][COUNT][kBlock];
  const int lanes = static_cast<int>(weight.groups < kLanes ? weight.groups : kLanes);
  for (int64_t g = 0; g < weight.groups; ++g) {
    __m512i s[COUNT][2];
    for (auto& of_token : s) of_token[0] = of_token[1] = _mm512_setzero_si512();
    for (int64_t part = g * each, end = part + each < parts ? part + each : parts; part < end; ++part) {
      const int64_t step = part / kLanes;
      const int t = static_cast<int>(part % kLanes);
      const int base = quad<BITS>(t, 0);
      const int8_t* codes = block.codes.data() + (step * kQuads + base) * kBlock * 4;
      for (int k = 0; k < 8; ++k) {
        const int offset = quad<BITS>(0, k);  // from the first quad of any group
        const __m512i low = _mm512_loadu_si512(codes + offset * kBlock * 4);
        const __m512i high = _mm512_loadu_si512(codes + offset * kBlock * 4 + 64);
        for (int i = 0; i < COUNT; ++i) {
          int32_t four;
          std::memcpy(&four, tokens[i].codes + step * kStep + (base + offset) * 4, 4);
          const __m512i q = _mm512_set1_epi32(four);
          s[i][0] = _mm512_dpbusd_epi32(s[i][0], q, low);
          s[i][1] = _mm512_dpbusd_epi32(s[i][1], q, high);
        }
      }
    }
    for (int i = 0; i < COUNT; ++i)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = g * kBlock + 16 * half;
        const __m512 whole = whole_sums<LEVELS, SHIFT>(weight, block, tokens[i], g, at, s[i][half]);
        float* into = a[kOne ? 0 : g % kLanes][i] + 16 * half;
        __m512 sum = g < kLanes ? _mm512_setzero_ps() : _mm512_load_ps(into);
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(block.scales.data() + at), whole, sum);
        if (SHIFT == ZSAQ_MINIMUM)
          sum = _mm512_fmadd_ps(_mm512_loadu_ps(block.minima.data() + at), _mm512_set1_ps(tokens[i].float_sums[g]), sum);
        _mm512_store_ps(into, sum);
      }
  }
  for (int i = 0; i < COUNT; ++i)
    for (int half = 0; half < 2; ++half) {
      __m512 b[8];  // partial sums that no group adds to are zero
      for (int j = 0; j < 8; ++j) {
        b[j] = j < lanes ? _mm512_load_ps(a[kOne ? 0 : j][i] + 16 * half) : _mm512_setzero_ps();
        b[j] = _mm512_add_ps(b[j], j + 8 < lanes ? _mm512_load_ps(a[kOne ? 0 : j + 8][i] + 16 * half) : _mm512_setzero_ps());
      }
      for (int n = kOne ? 0 : 4; n; n /= 2)
        for (int j = 0; j < n; ++j) b[j] = _mm512_add_ps(b[j], b[j + n]);
      const int64_t left = width - 16 * half;
      const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? static_cast<__mmask16>((1 << left) - 1) : 0;
      _mm512_mask_storeu_ps(sums + i * width + 16 * half, mask, b[0]);
    }
}

template <int BITS, int LEVELS, int SHIFT>
ZSAQ_INLINE void tiles(const Weight& weight, const Block& block, const Token* tokens, int64_t count, int64_t width, float* sums) {
  constexpr int kEach = LEVELS < 0 ? kTileOfOne : kTile;
  int64_t t = 0;
  for (; t + kEach <= count; t += kEach) tile<BITS, LEVELS, SHIFT, kEach>(weight, block, tokens + t, width, sums + t * width);
  for (; t < count; ++t) tile<BITS, LEVELS, SHIFT, 1>(weight, block, tokens + t, width, sums + t * width);
}

template <int BITS, int LEVELS>
ZSAQ_TARGET void many_tokens(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  thread_local Block block;
  fill<BITS, LEVELS>(weight, from, to, &block);
  switch (weight.layer->shift_type) {
    case ZSAQ_SYMMETRIC: return tiles<BITS, LEVELS, ZSAQ_SYMMETRIC>(weight, block, tokens, count, to - from, sums);
    case ZSAQ_ZERO_POINT: return tiles<BITS, LEVELS, ZSAQ_ZERO_POINT>(weight, block, tokens, count, to - from, sums);
    default: return tiles<BITS, LEVELS, ZSAQ_MINIMUM>(weight, block, tokens, count, to - from, sums);
  }
}

template <int BITS, int LEVELS>
void choose(int64_t tokens, Kernel* kernel) {
  const bool many = tokens >= kManyTokens;
  kernel->rows = many ? many_tokens<BITS, LEVELS> : few_tokens<BITS, LEVELS>;
  kernel->at_a_time = many ? kBlock : 16;
}

template <int BITS>
bool choose(int64_t group, int64_t groups, int64_t tokens, Kernel* kernel) {
  if (groups == 1)
    choose<BITS, -1>(tokens, kernel);
  else if (group == 32)
    choose<BITS, 0>(tokens, kernel);
  else if (group == 64)
    choose<BITS, 1>(tokens, kernel);
  else if (group == 128)
    choose<BITS, 2>(tokens, kernel);
  else
    return false;
  return true;
}

}  // namespace

bool avx512_runs() {
  static const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512bitalg");
  return runs;
}

bool avx512_kernel(const Weight& weight, int64_t tokens, Kernel* kernel) {
  const int64_t group = weight.layer->group, groups = weight.groups;
  switch (weight.layer->bits) {
    case 2: kernel->arrange = arrange2; return choose<2>(group, groups, tokens, kernel);
    case 3: kernel->arrange = arrange3; return choose<3>(group, groups, tokens, kernel);
    case 4: kernel->arrange = arrange4; return choose<4>(group, groups, tokens, kernel);
    case 8: kernel->arrange = nullptr; return choose<8>(group, groups, tokens, kernel);
    default: return false;
  }
}

ZSAQ_TARGET void avx512_finish(float scale, const float* sums, const float* bias, int64_t count, void* y, int32_t type) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (count - i)) - 1);
    const __m512 plus = bias ? _mm512_maskz_loadu_ps(mask, bias + i) : _mm512_setzero_ps();
    const __m512 v = _mm512_fmadd_ps(by, _mm512_maskz_loadu_ps(mask, sums + i), plus);
    if (type == ZSAQ_FLOAT32) {
      _mm512_mask_storeu_ps(static_cast<float*>(y) + i, mask, v);
      continue;
    }
    __m256i half;
    if (type == ZSAQ_FLOAT16) {
      half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m512i bits = _mm512_castps_si512(v);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
      half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, mask, half);
  }
}

ZSAQ_TARGET void avx512_digits(int digits, int64_t columns, const float* x, int64_t padded, uint8_t* codes, Token* token) {
  __m512 largest = _mm512_setzero_ps(), odd = largest;  // 0 * x is NaN where x is not finite
  for (int64_t i = 0; i < columns; i += 16) {
    const __mmask16 mask = columns - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (columns - i)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
    odd = _mm512_fmadd_ps(v, _mm512_setzero_ps(), odd);
  }
  const bool finite = !_mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q);
  const float highest = highest_fixed(digits), unit = _mm512_reduce_max_ps(largest) / highest;
  const float scale = finite && unit > 0.0f ? unit : 1.0f;
  token->zero = 128;
  token->scale = finite ? scale : NAN;
  const __m512 by = _mm512_set1_ps(scale), most = _mm512_set1_ps(highest), least = _mm512_set1_ps(-highest);
  const __m512i offset = _mm512_set1_epi32(fixed_offset(digits));
  for (int64_t i = 0; i < columns; i += 16) {
    const __mmask16 mask = columns - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (columns - i)) - 1);
    __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(finite ? mask : 0, x + i), by);
    v = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i fixed = _mm512_add_epi32(_mm512_cvttps_epi32(_mm512_max_ps(_mm512_min_ps(v, most), least)), offset);
    for (int d = 0; d < digits; ++d) {
      const __m512i digit = _mm512_srl_epi32(fixed, _mm_cvtsi32_si128(8 * (digits - 1 - d)));
      _mm_mask_storeu_epi8(codes + d * padded + i, mask, _mm512_cvtepi32_epi8(digit));
    }
  }
}

ZSAQ_TARGET void avx512_quantize(const ZsaqInput& input, int64_t columns, const float* x, uint8_t* codes, Token* token) {
  float scale = input.scale, zero = static_cast<float>(input.zero);
  if (!input.is_static) {
    __m512 low = _mm512_setzero_ps(), high = low, odd = low;  // 0 * x is NaN where x is not finite
    for (int64_t i = 0; i < columns; i += 16) {
      const __mmask16 mask = columns - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (columns - i)) - 1);
      const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
      low = _mm512_min_ps(v, low);
      high = _mm512_max_ps(v, high);
      odd = _mm512_fmadd_ps(v, _mm512_setzero_ps(), odd);
    }
    const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
    scale = (most - least) / static_cast<float>(input.highest);
    if (!std::isfinite(scale) || _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q)) {
      token->scale = NAN;
      token->zero = 0;
      std::memset(codes, 0, columns);
      return;
    }
    if (scale == 0.0f) scale = 1.0f;
    zero = std::nearbyint(-least / scale);
  }
  const __m512 by = _mm512_set1_ps(scale), plus = _mm512_set1_ps(zero);
  const __m512 highest = _mm512_set1_ps(static_cast<float>(input.highest));
  for (int64_t i = 0; i < columns; i += 16) {
    const __mmask16 mask = columns - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (columns - i)) - 1);
    const __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), by);
    __m512 code = _mm512_add_ps(_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), plus);
    code = _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), highest);  // max gives 0 for NaN
    _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(code)));
  }
  token->scale = scale;
  token->zero = static_cast<int32_t>(zero);
}

}  // namespace zsaq

#else

namespace zsaq {
bool avx512_runs() { return false; }
bool avx512_kernel(const Weight&, int64_t, Kernel*) { return false; }
void avx512_quantize(const ZsaqInput&, int64_t, const float*, uint8_t*, Token*) {}
void avx512_digits(int, int64_t, const float*, int64_t, uint8_t*, Token*) {}
void avx512_finish(float, const float*, const float*, int64_t, void*, int32_t) {}
}  // namespace zsaq

#endif
