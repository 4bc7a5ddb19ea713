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

struct Order {
  uint16_t of2[kStep], of3[kStep], of4[kStep];
  Order() {
    for (int p = 0; p < kRegisters; ++p)
      for (int j = 0; j < 64; ++j) {
        of2[p * 64 + j] = static_cast<uint16_t>(p / 4 * 256 + 4 * j + p % 4);
        of3[p * 64 + j] = static_cast<uint16_t>(p / 2 * 128 + 8 * (j / 4) + 4 * (p % 2) + j % 4);
        of4[p * 64 + j] = static_cast<uint16_t>(p / 2 * 128 + 2 * j + p % 2);
      }
  }
};
const Order kOrder;

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

  ZSAQ_INLINE void run(float* sums) {
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
      sums[t] = sum_lanes(a[t]);
    }
  }
};

template <int BITS, int LEVELS, int COUNT>
ZSAQ_INLINE void one_row(const Weight& weight, const Token* tokens, int64_t row, float* sums) {
  const int64_t steps = (weight.layer->columns + kStep - 1) / kStep;
  Row<BITS, LEVELS, COUNT> one{weight, tokens, weight.codes(row), weight.first(row), steps, {}, {}};
  one.run(sums);
}

template <int BITS, int LEVELS>
ZSAQ_TARGET void rows(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  for (int64_t row = from; row < to; ++row, sums += count) {
    int64_t t = 0;
    for (; t + kTogether <= count; t += kTogether) one_row<BITS, LEVELS, kTogether>(weight, tokens + t, row, sums + t);
    for (; t < count; ++t) one_row<BITS, LEVELS, 1>(weight, tokens + t, row, sums + t);
  }
}

template <int BITS>
RowsFunction rows_of(int64_t group, int64_t groups) {
  if (groups == 1) return rows<BITS, -1>;
  switch (group) {
    case 32: return rows<BITS, 0>;
    case 64: return rows<BITS, 1>;
    case 128: return rows<BITS, 2>;
    default: return nullptr;
  }
}

}  // namespace

bool avx512_runs() {
  static const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512bitalg");
  return runs;
}

bool avx512_kernel(const Weight& weight, Kernel* kernel) {
  const int64_t group = weight.layer->group;
  kernel->order = nullptr;
  switch (weight.layer->bits) {
    case 2: kernel->rows = rows_of<2>(group, weight.groups), kernel->order = kOrder.of2; break;
    case 3: kernel->rows = rows_of<3>(group, weight.groups), kernel->order = kOrder.of3; break;
    case 4: kernel->rows = rows_of<4>(group, weight.groups), kernel->order = kOrder.of4; break;
    case 8: kernel->rows = rows_of<8>(group, weight.groups); break;
    default: kernel->rows = nullptr;
  }
  return kernel->rows != nullptr;
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
bool avx512_kernel(const Weight&, Kernel*) { return false; }
void avx512_quantize(const ZsaqInput&, int64_t, const float*, uint8_t*, Token*) {}
}  // namespace zsaq

#endif
