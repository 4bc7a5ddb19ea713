// AVX-512 with VNNI and VBMI: sixteen rows of the weight at a time, one to each 32-bit lane.
//
// Codes stay packed in memory. What 64 bytes of sixteen rows hold is transposed and widened in registers: four columns of
// each row to a register, which a product takes with the same four of a token. Where a row is long and there is one token,
// the shuffles cost more than they save: see avx512_row.cpp.
#include "avx512.h"

#if defined(ZSAQ_AVX512)
#include <algorithm>
#include <type_traits>

namespace zsaq {

namespace {

constexpr int kRows = 16;           // of the weight, one to each 32-bit lane
constexpr int kPart = 32;           // columns that are multiplied together: eight quads, a group or a part of one
constexpr int kQuads = kPart / 4;   // of four columns, the bytes of a lane
constexpr int kTogether = 4;        // tokens that share a widened part

// A block is what `block_bytes` of a row hold: 16 words of 32 bits.
constexpr int words_of_part(int bits) { return 16 * kPart / (block_bytes(bits) * 8 / bits); }

// Within 16 columns, so that those whose codes are widened together follow each other.
ZSAQ_INLINE void shuffle_bytes(const uint8_t* codes, int64_t padded, uint8_t* out, __m128i order) {
  const __m512i index = _mm512_maskz_broadcast_i32x4(0xffff, order);
  for (int64_t i = 0; i < padded; i += 64)
    _mm512_storeu_si512(out + i, _mm512_shuffle_epi8(_mm512_loadu_si512(codes + i), index));
}

// Of 4 bits: byte b of a word holds columns 2 b and 2 b + 1.
ZSAQ_TARGET void arrange4(const uint8_t* codes, int64_t padded, uint8_t* out) {
  shuffle_bytes(codes, padded, out, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

// Of 2 bits: byte b holds columns 4 b to 4 b + 3.
ZSAQ_TARGET void arrange2(const uint8_t* codes, int64_t padded, uint8_t* out) {
  shuffle_bytes(codes, padded, out, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}

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

// Asks for memory that is read soon: sixteen rows at a time are no stream that a processor foresees. What is past the end
// of a tensor is not read by this.
ZSAQ_INLINE void ask_for(const void* values, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(values) + i, _MM_HINT_T1);
}

// A block of sixteen rows, from byte `at` of each: word k of all rows in register k. What is beyond a row reads as zero,
// and so do codes of 8 bits there less their offset.
template <int BITS>
ZSAQ_INLINE void read_block(const uint8_t* const* rows, int64_t at, int64_t row_bytes, __m512i* r) {
  constexpr int kBytes = block_bytes(BITS);
  const int64_t left = row_bytes - at;
  const __mmask64 mask = ~0ULL >> (64 - (left < kBytes ? left : kBytes));
  for (int i = 0; i < kRows; ++i) {
    r[i] = _mm512_maskz_loadu_epi8(mask, rows[i] + at);
    if constexpr (BITS == 8) r[i] = _mm512_maskz_add_epi8(mask, r[i], _mm512_set1_epi8(static_cast<char>(0x80)));
    if constexpr (BITS == 3) r[i] = spread3(r[i]);
  }
  transpose(r);
}

// The codes of a part, four columns of each row to a register.
template <int BITS>
ZSAQ_INLINE void widen_part(const __m512i* words, __m512i* c) {
  for (int k = 0; k < words_of_part(BITS); ++k) widen<BITS>(words[k], c + k * planes(BITS));
}

// The sum of the codes of a part, added to `sum`, a row to a lane.
template <int BITS>
ZSAQ_INLINE __m512i add_codes(const __m512i* c, __m512i sum) {
  const __m512i ones = _mm512_set1_epi8(1);
  if constexpr (BITS == 8) {
    for (int k = 0; k < kQuads; ++k) sum = _mm512_dpbusd_epi32(sum, ones, c[k]);
    return sum;
  }
  __m512i t[4];  // eight codes of up to 4 bits fit a byte
  for (int k = 0; k < 4; ++k) t[k] = _mm512_add_epi8(c[k], c[k + 4]);
  return _mm512_dpbusd_epi32(sum, ones, _mm512_add_epi8(_mm512_add_epi8(t[0], t[1]), _mm512_add_epi8(t[2], t[3])));
}

ZSAQ_INLINE __m512i four_of(const Token& token, int64_t i) {
  int32_t four;
  std::memcpy(&four, token.codes + i, 4);
  return _mm512_set1_epi32(four);
}

// Rows of the weight on their way to the product.
constexpr int kBlock = 32;  // of them
struct Block {
  std::vector<float> scales, minima;  // (an even number of groups, kBlock)
  std::vector<int32_t> zeros;         // zero points less OFFSET
  std::vector<int32_t> sums;          // of the codes of a group; in groups of up to 128 as float
  std::vector<int8_t> codes;          // (parts, kQuads, kBlock, 4)
};

// Scales or minima of sixteen rows as (groups, kBlock) of float.
template <typename Row>
ZSAQ_INLINE void by_group(int64_t groups, const void* values, int32_t type, Row first, float* out) {
  const int each = type == ZSAQ_FLOAT32 ? 1 : 2;  // in a word
  for (int64_t g = 0; g < groups; g += 16 * each, out += 16 * each * kBlock) {
    const int64_t left = std::min<int64_t>(groups - g, 16 * each);
    __m512i r[kRows];
    for (int i = 0; i < kRows; ++i)
      r[i] = each == 1 ? _mm512_maskz_loadu_epi32(0xffff >> (16 - left), static_cast<const float*>(values) + first(i) + g)
                       : _mm512_maskz_loadu_epi16(~0U >> (32 - left), static_cast<const uint16_t*>(values) + first(i) + g);
    transpose(r);
    for (int64_t k = 0; k < (left + each - 1) / each; ++k) {
      if (each == 1) {
        _mm512_storeu_si512(out + k * kBlock, r[k]);
        continue;
      }
      _mm512_storeu_ps(out + 2 * k * kBlock, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(r[k])));
      _mm512_storeu_ps(out + (2 * k + 1) * kBlock, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(r[k], 16))));
    }
  }
}

// Zero points of sixteen rows, less OFFSET, as (groups, kBlock).
template <typename Row>
ZSAQ_INLINE void zeros_by_group(const Weight& weight, Row first, int32_t* out) {
  const __m512i offset = _mm512_set1_epi32(offset_of(weight.layer->bits)), mask = _mm512_set1_epi32(0xff);
  for (int64_t g = 0; g < weight.groups; g += 64) {
    const int64_t left = std::min<int64_t>(weight.groups - g, 64);
    __m512i r[kRows];
    for (int i = 0; i < kRows; ++i)
      r[i] = _mm512_maskz_loadu_epi8(~0ULL >> (64 - left), static_cast<const uint8_t*>(weight.layer->shift) + first(i) + g);
    transpose(r);
    for (int64_t k = 0; k < left; ++k) {
      const __m512i bytes = _mm512_srl_epi32(r[k / 4], _mm_cvtsi32_si128(static_cast<int>(k % 4 * 8)));
      _mm512_storeu_si512(out + (g + k) * kBlock, _mm512_sub_epi32(_mm512_and_si512(bytes, mask), offset));
    }
  }
}

// Sixteen rows' scales and what goes with them, into half a block. A row past the end is the last one.
template <int BITS>
ZSAQ_INLINE void read_ranges(const Weight& weight, int64_t row, int64_t to, int half, Block* block) {
  const ZsaqWeight& layer = *weight.layer;
  const int64_t size = (weight.groups + 1) / 2 * 2 * kBlock, from = kRows * half;
  const auto first = [&](int i) ZSAQ_TARGET { return weight.first(std::min(row + i, to - 1)); };
  const int64_t width = layer.scale_type == ZSAQ_FLOAT32 ? 4 : 2, next = weight.first(row + 2 * kRows);
  ask_for(static_cast<const char*>(layer.scale) + next * width, kRows * weight.groups * width);
  block->scales.resize(size);
  by_group(weight.groups, layer.scale, layer.scale_type, first, block->scales.data() + from);
  if (layer.shift_type == ZSAQ_MINIMUM) {
    ask_for(static_cast<const char*>(layer.shift) + next * width, kRows * weight.groups * width);
    block->minima.resize(size);
    by_group(weight.groups, layer.shift, layer.scale_type, first, block->minima.data() + from);
    for (int64_t at = from; BITS == 8 && at < size; at += kBlock) {
      const __m512 scale = _mm512_loadu_ps(block->scales.data() + at), minimum = _mm512_loadu_ps(block->minima.data() + at);
      _mm512_storeu_ps(block->minima.data() + at, _mm512_fmadd_ps(_mm512_set1_ps(128.0f), scale, minimum));
    }
  } else if (layer.shift_type == ZSAQ_ZERO_POINT) {
    block->zeros.resize(size);
    zeros_by_group(weight, first, block->zeros.data() + from);
  }
}

ZSAQ_INLINE void row_addresses(const Weight& weight, int64_t row, int64_t to, const uint8_t** rows) {
  for (int i = 0; i < kRows; ++i) rows[i] = weight.codes(std::min(row + i, to - 1));
}

// What group g adds to a partial sum of sixteen rows, see layout.h: from s = sum q c and the sum of c. In groups of up to
// 128 columns all of it is below 2^24, and exact in float, which is faster; `codes` is a float there. `at` is g's in a block.
template <int LEVELS, int SHIFT>
ZSAQ_INLINE __m512 add_group(const Weight& weight, const Block& block, const Token& token, int64_t g, int64_t at, __m512i s,
                             __m512i codes, __m512 a) {
  __m512 f;
  if constexpr (LEVELS < 0) {
    const __m512i inputs = _mm512_set1_epi32(token.sums[g]);
    s = _mm512_sub_epi32(s, _mm512_mullo_epi32(_mm512_set1_epi32(token.zero), codes));
    if (SHIFT == ZSAQ_SYMMETRIC)
      s = _mm512_sub_epi32(s, _mm512_mullo_epi32(_mm512_set1_epi32(weight.symmetric_zero), inputs));
    else if (SHIFT == ZSAQ_ZERO_POINT)
      s = _mm512_sub_epi32(s, _mm512_mullo_epi32(_mm512_loadu_si512(block.zeros.data() + at), inputs));
    f = _mm512_cvtepi32_ps(s);
  } else {
    const __m512 inputs = _mm512_set1_ps(token.float_sums[g]);
    f = _mm512_cvtepi32_ps(s);
    f = _mm512_fnmadd_ps(_mm512_set1_ps(static_cast<float>(token.zero)), _mm512_castsi512_ps(codes), f);
    if (SHIFT == ZSAQ_SYMMETRIC)
      f = _mm512_fnmadd_ps(_mm512_set1_ps(static_cast<float>(weight.symmetric_zero)), inputs, f);
    else if (SHIFT == ZSAQ_ZERO_POINT)
      f = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(block.zeros.data() + at)), inputs, f);
  }
  a = _mm512_fmadd_ps(_mm512_loadu_ps(block.scales.data() + at), f, a);
  if (SHIFT == ZSAQ_MINIMUM)
    a = _mm512_fmadd_ps(_mm512_loadu_ps(block.minima.data() + at), _mm512_set1_ps(token.float_sums[g]), a);
  return a;
}

// Partial sums by halves, those that no group adds to are zero; `partial(j)` gives the j-th.
template <bool ONE, typename Partial>
ZSAQ_INLINE __m512 sum_partials(int64_t groups, Partial partial) {
  if constexpr (ONE) return partial(0);
  __m512 b[8];
  for (int j = 0; j < 8; ++j) {
    b[j] = j < groups ? partial(j) : _mm512_setzero_ps();
    b[j] = _mm512_add_ps(b[j], j + 8 < groups ? partial(j + 8) : _mm512_setzero_ps());
  }
  for (int n = 4; n; n /= 2)
    for (int j = 0; j < n; ++j) b[j] = _mm512_add_ps(b[j], b[j + n]);
  return b[0];
}

// Sixteen rows of the weight and a few tokens; sums (COUNT, width). `next`: the codes of rows that are read soon, or null.
template <int BITS, int LEVELS, int SHIFT, int COUNT>
ZSAQ_INLINE void multiply(const Weight& weight, const Block& block, const uint8_t* const* rows, const uint8_t* next,
                          const Token* tokens, int64_t width, __mmask16 mask, float* sums) {
  constexpr int kWords = words_of_part(BITS);
  const int64_t parts = (weight.layer->columns + kPart - 1) / kPart;
  __m512 a[LEVELS < 0 ? 1 : kLanes][COUNT];
  __m512i s[COUNT][2], codes = _mm512_setzero_si512();
  for (auto& of_token : s) of_token[0] = of_token[1] = _mm512_setzero_si512();
  for (int64_t part = 0, at = 0; part < parts; at += block_bytes(BITS)) {
    __m512i words[16];
    if (next) ask_for(next + at * kRows, block_bytes(BITS) * kRows);
    read_block<BITS>(rows, at, weight.row_bytes, words);
    for (int b = 0; b < 16 / kWords && part < parts; ++b, ++part) {
      __m512i c[kQuads];
      widen_part<BITS>(words + b * kWords, c);
      codes = add_codes<BITS>(c, codes);
      for (int t = 0; t < COUNT; ++t)
        for (int k = 0; k < kQuads; ++k)
          s[t][k % 2] = _mm512_dpbusd_epi32(s[t][k % 2], four_of(tokens[t], part * kPart + 4 * k), c[k]);
      if (part + 1 < parts && (LEVELS < 0 || (part + 1) % (1 << (LEVELS < 0 ? 0 : LEVELS)))) continue;
      const int64_t g = LEVELS < 0 ? 0 : part >> (LEVELS < 0 ? 0 : LEVELS);
      if (LEVELS >= 0) codes = _mm512_castps_si512(_mm512_cvtepi32_ps(codes));
      for (int t = 0; t < COUNT; ++t) {
        __m512& into = a[g % (LEVELS < 0 ? 1 : kLanes)][t];
        const __m512i both = _mm512_add_epi32(s[t][0], s[t][1]);
        const __m512 before = g < kLanes ? _mm512_setzero_ps() : into;
        into = add_group<LEVELS, SHIFT>(weight, block, tokens[t], g, g * kBlock, both, codes, before);
        s[t][0] = s[t][1] = _mm512_setzero_si512();
      }
      codes = _mm512_setzero_si512();
    }
  }
  for (int t = 0; t < COUNT; ++t)
    _mm512_mask_storeu_ps(sums + t * width, mask, sum_partials<LEVELS < 0>(weight.groups, [&](int j) ZSAQ_TARGET { return a[j][t]; }));
}

template <int BITS, int LEVELS, int SHIFT>
ZSAQ_INLINE void few_tokens(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  thread_local Block block;
  const int64_t width = to - from;
  for (int64_t row = from; row < to; row += kRows) {
    const uint8_t* rows[kRows];
    const __mmask16 mask = to - row >= kRows ? 0xffff : static_cast<__mmask16>((1 << (to - row)) - 1);
    row_addresses(weight, row, to, rows);
    read_ranges<BITS>(weight, row, to, 0, &block);
    float* into = sums + row - from;
    const uint8_t* next = weight.codes(row + 2 * kRows);
    for (int64_t t = 0; t < count; next = nullptr) {
      const bool together = t + kTogether <= count;
      if (together)
        multiply<BITS, LEVELS, SHIFT, kTogether>(weight, block, rows, next, tokens + t, width, mask, into + t * width);
      else
        multiply<BITS, LEVELS, SHIFT, 1>(weight, block, rows, next, tokens + t, width, mask, into + t * width);
      t += together ? kTogether : 1;
    }
  }
}

// Many tokens: a block of rows is widened into the cache, four codes of each row side by side, and multiplied by tile of
// tokens.

constexpr int kTile = 4, kTileOfOne = 8;  // tokens; more where all columns are one group
constexpr int64_t kManyTokens = 12;       // from here on widening into the cache pays

template <int BITS, int LEVELS>
ZSAQ_INLINE void fill(const Weight& weight, int64_t from, int64_t to, Block* block) {
  constexpr int kWords = words_of_part(BITS);
  const int64_t parts = (weight.layer->columns + kPart - 1) / kPart;
  block->codes.resize(parts * kPart * kBlock);
  block->sums.resize(weight.groups * kBlock);
  for (int half = 0; half < 2; ++half) {
    const int64_t row = from + kRows * half;
    const uint8_t* rows[kRows];
    row_addresses(weight, row, to, rows);
    read_ranges<BITS>(weight, row, to, half, block);
    __m512i codes = _mm512_setzero_si512();
    for (int64_t part = 0, at = 0; part < parts; at += block_bytes(BITS)) {
      __m512i words[16];
      read_block<BITS>(rows, at, weight.row_bytes, words);
      for (int b = 0; b < 16 / kWords && part < parts; ++b, ++part) {
        __m512i c[kQuads];
        widen_part<BITS>(words + b * kWords, c);
        codes = add_codes<BITS>(c, codes);
        int8_t* into = block->codes.data() + (part * kQuads * kBlock + kRows * half) * 4;
        for (int k = 0; k < kQuads; ++k) _mm512_storeu_si512(into + k * kBlock * 4, c[k]);
        if (part + 1 < parts && (LEVELS < 0 || (part + 1) % (1 << (LEVELS < 0 ? 0 : LEVELS)))) continue;
        const int64_t g = LEVELS < 0 ? 0 : part >> (LEVELS < 0 ? 0 : LEVELS);
        if (LEVELS >= 0) codes = _mm512_castps_si512(_mm512_cvtepi32_ps(codes));
        _mm512_storeu_si512(block->sums.data() + g * kBlock + kRows * half, codes);
        codes = _mm512_setzero_si512();
      }
    }
  }
}

// Tokens times a block, into sums (tokens, width).
template <int LEVELS, int SHIFT, int COUNT>
ZSAQ_INLINE void tile(const Weight& weight, const Block& block, const Token* tokens, int64_t width, float* sums) {
  const int64_t parts = (weight.layer->columns + kPart - 1) / kPart;
  const int64_t each = LEVELS < 0 ? parts : int64_t{1} << (LEVELS < 0 ? 0 : LEVELS);  // parts of a group
  constexpr int kSums = LEVELS < 0 ? 1 : kLanes;
  alignas(64) float a[kSums][COUNT][kBlock];
  for (int64_t g = 0; g < weight.groups; ++g) {
    __m512i s[COUNT][2];
    for (auto& of_token : s) of_token[0] = of_token[1] = _mm512_setzero_si512();
    for (int64_t part = g * each, end = std::min(part + each, parts); part < end; ++part) {
      const int8_t* codes = block.codes.data() + part * kQuads * kBlock * 4;
      for (int k = 0; k < kQuads; ++k) {
        const __m512i low = _mm512_loadu_si512(codes + k * kBlock * 4), high = _mm512_loadu_si512(codes + k * kBlock * 4 + 64);
        for (int i = 0; i < COUNT; ++i) {
          const __m512i q = four_of(tokens[i], part * kPart + 4 * k);
          s[i][0] = _mm512_dpbusd_epi32(s[i][0], q, low);
          s[i][1] = _mm512_dpbusd_epi32(s[i][1], q, high);
        }
      }
    }
    for (int i = 0; i < COUNT; ++i)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = g * kBlock + kRows * half;
        float* into = a[g % kSums][i] + kRows * half;
        const __m512 before = g < kLanes ? _mm512_setzero_ps() : _mm512_load_ps(into);
        const __m512i sum_of_codes = _mm512_loadu_si512(block.sums.data() + at);
        _mm512_store_ps(into, add_group<LEVELS, SHIFT>(weight, block, tokens[i], g, at, s[i][half], sum_of_codes, before));
      }
  }
  for (int i = 0; i < COUNT; ++i)
    for (int half = 0; half < 2; ++half) {
      const auto partial = [&](int j) ZSAQ_TARGET { return _mm512_load_ps(a[j][i] + kRows * half); };
      const int64_t left = width - kRows * half;
      const __mmask16 mask = left >= kRows ? 0xffff : left > 0 ? static_cast<__mmask16>((1 << left) - 1) : 0;
      _mm512_mask_storeu_ps(sums + i * width + kRows * half, mask, sum_partials<LEVELS < 0>(weight.groups, partial));
    }
}

template <int BITS, int LEVELS, int SHIFT>
ZSAQ_INLINE void many_tokens(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  constexpr int kEach = LEVELS < 0 ? kTileOfOne : kTile;
  thread_local Block block;
  const int64_t width = to - from;
  fill<BITS, LEVELS>(weight, from, to, &block);
  int64_t t = 0;
  for (; t + kEach <= count; t += kEach) tile<LEVELS, SHIFT, kEach>(weight, block, tokens + t, width, sums + t * width);
  for (; t < count; ++t) tile<LEVELS, SHIFT, 1>(weight, block, tokens + t, width, sums + t * width);
}

template <int BITS, int LEVELS, bool MANY>
ZSAQ_TARGET void rows_of(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  const auto run = [&](auto shift) ZSAQ_TARGET {
    if constexpr (MANY)
      many_tokens<BITS, LEVELS, decltype(shift)::value>(weight, tokens, count, from, to, sums);
    else
      few_tokens<BITS, LEVELS, decltype(shift)::value>(weight, tokens, count, from, to, sums);
  };
  switch (weight.layer->shift_type) {
    case ZSAQ_SYMMETRIC: return run(std::integral_constant<int, ZSAQ_SYMMETRIC>());
    case ZSAQ_ZERO_POINT: return run(std::integral_constant<int, ZSAQ_ZERO_POINT>());
    default: return run(std::integral_constant<int, ZSAQ_MINIMUM>());
  }
}

template <int BITS, int LEVELS>
void choose(int64_t tokens, Kernel* kernel) {
  const bool many = tokens >= kManyTokens;
  kernel->rows = many ? rows_of<BITS, LEVELS, true> : rows_of<BITS, LEVELS, false>;
  kernel->at_a_time = kBlock;
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
  if (tokens == 1 && avx512_row_kernel(weight, kernel)) return true;
  const int64_t group = weight.layer->group, groups = weight.groups;
  switch (weight.layer->bits) {
    case 2: kernel->arrange = arrange2; return choose<2>(group, groups, tokens, kernel);
    case 3: kernel->arrange = nullptr; return choose<3>(group, groups, tokens, kernel);
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
