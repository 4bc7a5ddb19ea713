// AVX2: the codes of a row are widened into bytes, and multiplied by every token.
//
// Columns keep their order. Thirty-two of them make a product of eight sums; those of a group are added up, and the eight
// sums of eight groups are brought together at once.
#include "inputs.h"
#include "layout.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>

#define ZSAQ_AVX2_TARGET __attribute__((target("avx2,fma,f16c")))
#define ZSAQ_AVX2_INLINE ZSAQ_AVX2_TARGET __attribute__((always_inline)) inline

namespace zsaq {

namespace {

constexpr int kPart = 32;  // columns of a product

// Thirty-two codes from BITS * 4 bytes.
template <int BITS>
ZSAQ_AVX2_INLINE __m256i widen(const uint8_t* p) {
  if constexpr (BITS == 8) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi8(-128));
  } else if constexpr (BITS == 4) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(v, mask), odd = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  } else if constexpr (BITS == 2) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(3);
    const __m128i nibbles = _mm_unpacklo_epi8(v, _mm_srli_epi16(v, 4));  // two codes each, in order
    const __m128i even = _mm_and_si128(nibbles, mask), odd = _mm_and_si128(_mm_srli_epi16(nibbles, 2), mask);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  } else {
    int32_t words[3];  // twelve bytes; three of them hold eight codes, twelve bits the four of a lane
    std::memcpy(words, p, 12);
    const __m256i v = _mm256_broadcastsi128_si256(_mm_setr_epi32(words[0], words[1], words[2], 0));
    const __m256i spread = _mm256_shuffle_epi8(
        v, _mm256_setr_epi8(0, 1, 2, -1, 0, 1, 2, -1, 3, 4, 5, -1, 3, 4, 5, -1, 6, 7, 8, -1, 6, 7, 8, -1, 9, 10, 11, -1, 9, 10, 11, -1));
    const __m256i x = _mm256_srlv_epi32(spread, _mm256_setr_epi32(0, 12, 0, 12, 0, 12, 0, 12));
    const __m256i low = _mm256_or_si256(_mm256_and_si256(x, _mm256_set1_epi32(7)),
                                        _mm256_and_si256(_mm256_slli_epi32(x, 5), _mm256_set1_epi32(0x700)));
    const __m256i high = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi32(x, 10), _mm256_set1_epi32(0x70000)),
                                         _mm256_and_si256(_mm256_slli_epi32(x, 15), _mm256_set1_epi32(0x7000000)));
    return _mm256_or_si256(low, high);
  }
}

// sum + q c, of thirty-two columns. Codes below 16 do not overflow the 16 bits of a pair; signed bytes would.
template <int BITS>
ZSAQ_AVX2_INLINE __m256i add_products(__m256i sum, __m256i q, __m256i c) {
  if constexpr (BITS < 8)
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(q, c), _mm256_set1_epi16(1)));
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(q)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(c)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(q, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(c, 1)));
  return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
}

// The sums of the lanes of eight registers.
ZSAQ_AVX2_INLINE __m256i lane_sums(const __m256i* v) {
  const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// A row of the weight, widened; behind the last column and group there are zeros.
struct Row {
  std::vector<int8_t> codes;              // (columns padded to kPart)
  std::vector<int32_t> sums, zeros;       // (groups padded to kLanes): of codes; zero points less OFFSET
  std::vector<float> scales, minima;      // (groups padded to kLanes)
};

ZSAQ_AVX2_INLINE float scale_at(const void* values, int64_t i, int32_t type) {
  return type == ZSAQ_FLOAT32 ? static_cast<const float*>(values)[i] : _cvtsh_ss(static_cast<const uint16_t*>(values)[i]);
}

// The sums over groups of q c, into `out` (groups padded to kLanes). EACH: parts of a group; 0: all are one.
template <int BITS, int EACH>
ZSAQ_AVX2_INLINE void group_sums(const uint8_t* q, const int8_t* c, int64_t parts, int32_t* out) {
  const auto product = [&](__m256i sum, int64_t p) ZSAQ_AVX2_TARGET {
    return add_products<BITS>(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + p * kPart)),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + p * kPart)));
  };
  const __m256i none = _mm256_setzero_si256();
  if constexpr (EACH == 0) {
    __m256i s[8] = {none, none, none, none, none, none, none, none};
    int64_t p = 0;
    for (; p + 4 <= parts; p += 4)
      for (int i = 0; i < 4; ++i) s[i] = product(s[i], p + i);
    for (; p < parts; ++p) s[0] = product(s[0], p);
    s[0] = _mm256_add_epi32(_mm256_add_epi32(s[0], s[1]), _mm256_add_epi32(s[2], s[3]));
    s[1] = s[2] = s[3] = none;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), lane_sums(s));
    return;
  }
  constexpr int kEach = EACH ? EACH : 1;
  int64_t p = 0;
  for (; p + 8 * kEach <= parts; p += 8 * kEach, out += 8) {
    __m256i s[8];
    for (int i = 0; i < 8; ++i) {
      s[i] = product(none, p + i * kEach);
      for (int k = 1; k < kEach; ++k) s[i] = product(s[i], p + i * kEach + k);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), lane_sums(s));
  }
  if (p < parts) {
    __m256i s[8] = {none, none, none, none, none, none, none, none};
    for (int64_t i = 0; p + i < parts; ++i) s[i / kEach] = product(s[i / kEach], p + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), lane_sums(s));
  }
}

template <int BITS, int EACH>
ZSAQ_AVX2_INLINE void read_row(const Weight& weight, int64_t r, int64_t parts, const uint8_t* ones, Row* row) {
  const ZsaqWeight& layer = *weight.layer;
  const uint8_t* packed = weight.codes(r);
  const int64_t whole = layer.columns / kPart, first = weight.first(r);
  for (int64_t p = 0; p < whole; ++p)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row->codes.data() + p * kPart), widen<BITS>(packed + p * 4 * BITS));
  if (whole < parts) {
    uint8_t last[kPart] = {};  // what is behind the row is not read
    std::memcpy(last, packed + whole * 4 * BITS, weight.row_bytes - whole * 4 * BITS);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row->codes.data() + whole * kPart), widen<BITS>(last));
    std::fill(row->codes.begin() + layer.columns, row->codes.begin() + parts * kPart, static_cast<int8_t>(0));
  }
  group_sums<BITS, EACH>(ones, row->codes.data(), parts, row->sums.data());
  for (int64_t g = 0; g < weight.groups; ++g) row->scales[g] = scale_at(layer.scale, first + g, layer.scale_type);
  if (layer.shift_type == ZSAQ_ZERO_POINT)
    for (int64_t g = 0; g < weight.groups; ++g)
      row->zeros[g] = static_cast<const uint8_t*>(layer.shift)[first + g] - offset_of(BITS);
  if (layer.shift_type == ZSAQ_MINIMUM)
    for (int64_t g = 0; g < weight.groups; ++g) {
      const float minimum = scale_at(layer.shift, first + g, layer.scale_type);
      row->minima[g] = BITS == 8 ? std::fma(128.0f, row->scales[g], minimum) : minimum;
    }
}

// What the groups of a row add up to for one token. See layout.h.
ZSAQ_AVX2_INLINE float add_groups(const Row& row, const Token& token, const int32_t* sums, int64_t groups, bool minima) {
  __m256 a[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  const __m256i zero = _mm256_set1_epi32(token.zero);
  for (int64_t g = 0; g < groups; g += 8) {
    const auto read = [&](const int32_t* p) ZSAQ_AVX2_TARGET { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + g)); };
    __m256i s = _mm256_sub_epi32(read(sums), _mm256_mullo_epi32(zero, read(row.sums.data())));
    s = _mm256_sub_epi32(s, _mm256_mullo_epi32(read(row.zeros.data()), read(token.sums)));
    __m256& into = a[g / 8 % 2];
    into = _mm256_fmadd_ps(_mm256_loadu_ps(row.scales.data() + g), _mm256_cvtepi32_ps(s), into);
    if (minima) into = _mm256_fmadd_ps(_mm256_loadu_ps(row.minima.data() + g), _mm256_loadu_ps(token.float_sums + g), into);
  }
  const __m256 b = _mm256_add_ps(a[0], a[1]);
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

template <int BITS, int EACH>
ZSAQ_AVX2_TARGET void all_rows(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  thread_local Row row;
  thread_local std::vector<int32_t> products;
  thread_local std::vector<uint8_t> ones;
  const int64_t parts = (weight.layer->columns + kPart - 1) / kPart, groups = weight.groups;
  const int64_t padded = (groups + kLanes - 1) / kLanes * kLanes;
  row.codes.resize(parts * kPart);
  row.sums.assign(padded, 0);
  row.zeros.assign(padded, weight.layer->shift_type == ZSAQ_SYMMETRIC ? weight.symmetric_zero : 0);
  row.scales.assign(padded, 0.0f);
  row.minima.assign(padded, 0.0f);
  products.assign(padded, 0);
  ones.assign(parts * kPart, 1);
  const bool minima = weight.layer->shift_type == ZSAQ_MINIMUM;
  for (int64_t r = from; r < to; ++r) {
    read_row<BITS, EACH>(weight, r, parts, ones.data(), &row);
    for (int64_t t = 0; t < count; ++t) {
      group_sums<BITS, EACH>(tokens[t].codes, row.codes.data(), parts, products.data());
      sums[t * (to - from) + r - from] = add_groups(row, tokens[t], products.data(), groups, minima);
    }
  }
}

template <int BITS>
bool choose(int64_t group, int64_t groups, Kernel* kernel) {
  RowsFunction rows = groups == 1    ? all_rows<BITS, 0>
                      : group == 32  ? all_rows<BITS, 1>
                      : group == 64  ? all_rows<BITS, 2>
                      : group == 128 ? all_rows<BITS, 4>
                                     : nullptr;
  *kernel = {rows, 16, nullptr};
  return rows;
}

}  // namespace

bool avx2_runs() {
  static const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and f16c, which is older
  return runs;
}

bool avx2_kernel(const Weight& weight, int64_t, Kernel* kernel) {
  const int64_t group = weight.layer->group, groups = weight.groups;
  switch (weight.layer->bits) {
    case 2: return choose<2>(group, groups, kernel);
    case 3: return choose<3>(group, groups, kernel);
    case 4: return choose<4>(group, groups, kernel);
    case 8: return choose<8>(group, groups, kernel);
    default: return false;
  }
}

ZSAQ_AVX2_TARGET void avx2_finish(float scale, const float* sums, const float* bias, int64_t count, void* y, int32_t type) {
  finish_outputs(scale, sums, bias, count, y, type);
}

ZSAQ_AVX2_TARGET void avx2_digits(int digits, int64_t columns, const float* x, int64_t padded, uint8_t* codes, Token* token) {
  make_digits(digits, columns, x, padded, codes, token);
}

ZSAQ_AVX2_TARGET void avx2_quantize(const ZsaqInput& input, int64_t columns, const float* x, uint8_t* codes, Token* token) {
  make_codes(input, columns, x, codes, token);
}

}  // namespace zsaq

#else

namespace zsaq {
bool avx2_runs() { return false; }
bool avx2_kernel(const Weight&, int64_t, Kernel*) { return false; }
void avx2_finish(float, const float*, const float*, int64_t, void*, int32_t) {}
void avx2_digits(int, int64_t, const float*, int64_t, uint8_t*, Token*) {}
void avx2_quantize(const ZsaqInput&, int64_t, const float*, uint8_t*, Token*) {}
}  // namespace zsaq

#endif
