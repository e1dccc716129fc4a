// Products of float32 rows with int8 matrices in integers, by instructions that multiply int8 four
// at a time. They are exact, and therefore the same in any order.
//
// As in xla_cpu.matmul, a row is a power of two times integers of 27 bits, each of which is four
// signed digits of seven bits. A tile holds the digits of four rows: 16 rows of bytes, row by row,
// the lowest digit first, for 64 inputs. Weights are rearranged to match: 64 inputs by 64 columns
// become four blocks of 16 lines, whose lane n holds four inputs of one column.
//
// Two kinds of instructions multiply them: Intel's matrix extensions (AMX), and for few rows
// AVX-512's dot products. Both give the same bits. Alone, dot products are no faster than floats.

#ifndef KERNELS_INTEGERS_H_
#define KERNELS_INTEGERS_H_

#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define KERNELS_INTEGERS 1

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#if defined(__AMX_INT8__) && defined(__linux__)
#define KERNELS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kWide = 4096;  // columns from which the processor prefetches rows itself
constexpr int64_t kDigits = 4, kDigitBits = 7;
constexpr int kBits = kDigits * kDigitBits - 2;  // of a magnitude: the highest digit is not full
// A tile holds kTokens rows of x.
constexpr int64_t kSide = 16;                    // rows of a tile, lanes of a vector
constexpr int64_t kDepth = 64;                   // inputs of a tile
constexpr int64_t kTileBytes = kSide * kDepth;
constexpr int64_t kColumns = 64;                   // of a panel: four blocks
constexpr int64_t kPanelBytes = kDepth * kColumns;  // of a panel's weights, for the inputs of a tile
constexpr int64_t kPanelSums = kSide * kColumns;    // of a tile with a panel
constexpr int64_t kAllSums = 192 * 1024;  // sums of a part: they stay in the second-level cache,
constexpr int64_t kArranged = 512 * 1024;  // together with these bytes of rearranged weights
constexpr int64_t kStrip = 16;             // inputs that are rearranged at a time, in memory order

inline __mmask16 First16(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// The digits of rows of x, at most kTokens rows per tile.
class Digits {
 public:
  // For `inputs` in `groups`, each of which begins a new tile.
  void Resize(int64_t tiles, int64_t inputs, int64_t groups) {
    inputs_ = inputs / groups;
    groups_ = groups;
    blocks_ = (inputs_ + kDepth - 1) / kDepth;
    tiles_ = static_cast<int8_t*>(bytes_.AtLeast(tiles * groups * blocks_ * kTileBytes));
    units_ = static_cast<float*>(unit_bytes_.AtLeast(tiles * kTokens * sizeof(float)));
    totals_ = static_cast<int32_t*>(total_bytes_.AtLeast(tiles * groups * kSide * sizeof(int32_t)));
  }

  int64_t blocks() const { return blocks_; }  // of kDepth inputs, in a group
  const int8_t* tile(int64_t t, int64_t group, int64_t block) const {
    return tiles_ + ((t * groups_ + group) * blocks_ + block) * kTileBytes;
  }
  float unit(int64_t row) const { return units_[row]; }
  // The sum of the digits of each row of a tile in a group.
  const int32_t* totals(int64_t t, int64_t group) const {
    return totals_ + (t * groups_ + group) * kSide;
  }

  // Writes `count` rows of x as tile t.
  void Write(int64_t t, const float* x, int64_t count) {
    if (count < kTokens) std::memset(tiles_ + t * groups_ * blocks_ * kTileBytes, 0,
                                     groups_ * blocks_ * kTileBytes);
    for (int64_t token = 0; token < count; ++token) {
      WriteRow(t, token, x + token * groups_ * inputs_);
    }
  }

 private:
  void WriteRow(int64_t t, int64_t token, const float* x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0, width = groups_ * inputs_; i < width; i += kLanes) {
      __m512i bits = _mm512_maskz_loadu_epi32(First16(width - i), x + i);
      most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    int32_t largest = _mm512_reduce_max_epi32(most);  // a float's bits, in the order of the floats
    // A subnormal float32 unit would become zero.
    int exponent = std::max((largest >> 23) - 126, kBits - 124);
    bool finite = largest < 0x7f800000;
    units_[t * kTokens + token] =
        finite ? std::ldexp(1.0f, exponent - kBits) : std::numeric_limits<float>::quiet_NaN();
    const __m512 scale = _mm512_set1_ps(std::ldexp(1.0f, kBits - exponent));
    for (int64_t group = 0; group < groups_; ++group) {
      WriteGroup(t, token, group, x + group * inputs_, scale);
    }
  }

  void WriteGroup(int64_t t, int64_t token, int64_t group, const float* x, __m512 scale) {
    const __m512i half = _mm512_set1_epi32(1 << (kDigitBits - 1));
    const __m512i full = _mm512_set1_epi32((1 << kDigitBits) - 1);
    __m512i total[kDigits] = {};
    for (int64_t i = 0; i < blocks_ * kDepth; i += kLanes) {
      __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(First16(inputs_ - i), x + i), scale);
      __m512i number = _mm512_cvtps_epi32(scaled);
      int8_t* to = tiles_ + ((t * groups_ + group) * blocks_ + i / kDepth) * kTileBytes +
                   token * kDigits * kDepth + i % kDepth;
      for (int d = 0; d < kDigits; ++d) {
        __m512i digit = number;  // the highest digit is the remainder
        if (d < kDigits - 1) {
          digit = _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(number, half), full), half);
          number = _mm512_srai_epi32(_mm512_sub_epi32(number, digit), kDigitBits);
        }
        total[d] = _mm512_add_epi32(total[d], digit);
        _mm_store_si128(reinterpret_cast<__m128i*>(to + d * kDepth), _mm512_cvtepi32_epi8(digit));
      }
    }
    int32_t* totals = totals_ + (t * groups_ + group) * kSide + token * kDigits;
    for (int d = 0; d < kDigits; ++d) totals[d] = _mm512_reduce_add_epi32(total[d]);
  }

  Memory bytes_, unit_bytes_, total_bytes_;
  int8_t* tiles_;
  float* units_;
  int32_t* totals_;
  int64_t inputs_, groups_, blocks_;
};

// Rearranges `rows` inputs of a panel of weights, from a multiple of four on, and `width` columns:
// four inputs and 16 columns become a line of one of the four blocks, padded with zeros.
inline void Arrange(const int8_t* weight, int64_t stride, int64_t rows, int64_t width, int8_t* to) {
  bool whole = rows % 4 == 0 && width >= kColumns;
  __mmask64 columns = width >= kColumns ? ~0ull : (1ull << width) - 1;
  for (int64_t i = 0; i < rows; i += 4, weight += 4 * stride, to += kLine) {
    __m512i in[4];
    if (whole) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) in[r] = _mm512_loadu_si512(weight + r * stride);
    } else {
      for (int r = 0; r < 4; ++r) {
        in[r] = _mm512_setzero_si512();
        if (i + r < rows) in[r] = _mm512_maskz_loadu_epi8(columns, weight + r * stride);
      }
    }
    // These work within each quarter of a vector: block v holds columns 4 v ... 4 v + 3 of each.
    __m512i a = _mm512_unpacklo_epi8(in[0], in[1]), b = _mm512_unpackhi_epi8(in[0], in[1]);
    __m512i c = _mm512_unpacklo_epi8(in[2], in[3]), d = _mm512_unpackhi_epi8(in[2], in[3]);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
    _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(a, c));
    _mm512_store_si512(to + 2 * kTileBytes, _mm512_unpacklo_epi16(b, d));
    _mm512_store_si512(to + 3 * kTileBytes, _mm512_unpackhi_epi16(b, d));
  }
}

// ------------------------------------------------------------------------- by AVX-512's products

// Adds the products of kCount rows of a tile with `lines` lines of kBlocks blocks to their sums.
// The instruction takes one side as unsigned: the weights with their highest bit flipped, which
// adds 128.
template <int kCount, int kBlocks>
inline void AddLines(const int8_t* tile, const int8_t* arranged, int64_t lines, int32_t* sums) {
  const __m512i turn = _mm512_set1_epi8(-128);
  constexpr int kOwn = kCount * kDigits;
  __m512i sum[kOwn][kBlocks];
#pragma GCC unroll 16
  for (int r = 0; r < kOwn; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kBlocks; ++v) {
      sum[r][v] = _mm512_load_si512(sums + (v * kSide + r) * kLanes);
    }
  }
  for (int64_t i = 0; i < lines; ++i) {
    __m512i weights[kBlocks];
#pragma GCC unroll 4
    for (int v = 0; v < kBlocks; ++v) {
      weights[v] = _mm512_xor_si512(turn, _mm512_load_si512(arranged + v * kTileBytes + i * kLine));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kOwn; ++r) {
      int32_t four;
      std::memcpy(&four, tile + r * kDepth + 4 * i, sizeof(four));
      __m512i digits = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < kBlocks; ++v) {
        sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], weights[v], digits);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kOwn; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kBlocks; ++v) {
      _mm512_store_si512(sums + (v * kSide + r) * kLanes, sum[r][v]);
    }
  }
}

// The same for all four blocks, as many at a time as keep their sums in registers.
template <int kCount>
void AddAllLines(const int8_t* tile, const int8_t* arranged, int64_t lines, int32_t* sums) {
  constexpr int kBlocks = kCount == 1 ? 4 : kCount == 2 ? 2 : 1;
  for (int v = 0; v < 4; v += kBlocks) {
    AddLines<kCount, kBlocks>(tile, arranged + v * kTileBytes, lines, sums + v * kSide * kLanes);
  }
}

// ------------------------------------------------------------------- by Intel's matrix extensions

#ifdef KERNELS_AMX

// Returns whether the system lets this process use AMX.
inline bool HasTiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// Configures this thread's tile registers during its lifetime: `rows` rows of sums (0 to 3) and of
// digits (4), and 16 rows of weights (5 to 7).
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct alignas(kLine) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.bytes[t] = kDepth;
      config.rows[t] = t < 5 ? rows : kSide;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Adds the products of `count` consecutive tiles with as many panels to their sums.
inline void AddTiles(const int8_t* tile, const int8_t* arranged, int64_t count, bool begin,
                     int32_t* sums) {
  __asm__ volatile("" ::: "memory");  // GCC does not know that a tile's load reads memory
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kLine);
    _tile_loadd(1, sums + kSide * kLanes, kLine);
    _tile_loadd(2, sums + 2 * kSide * kLanes, kLine);
    _tile_loadd(3, sums + 3 * kSide * kLanes, kLine);
  }
  for (int64_t k = 0; k < count; ++k, tile += kTileBytes, arranged += kPanelBytes) {
    _tile_loadd(4, tile, kLine);
    _tile_loadd(5, arranged, kLine);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, arranged + kTileBytes, kLine);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, arranged + 2 * kTileBytes, kLine);
    _tile_dpbssd(2, 4, 7);
    _tile_loadd(5, arranged + 3 * kTileBytes, kLine);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_stored(0, sums, kLine);
  _tile_stored(1, sums + kSide * kLanes, kLine);
  _tile_stored(2, sums + 2 * kSide * kLanes, kLine);
  _tile_stored(3, sums + 3 * kSide * kLanes, kLine);
}

#endif  // KERNELS_AMX

// ------------------------------------------------------------------------------------ by either

// Rows of x, starting at a tile, and some columns of a matrix.
struct Part {
  const Digits& x;
  int64_t first_tile, rows;
  const Matrix& matrix;
  int64_t first, width;

  int64_t tiles() const { return (rows + kTokens - 1) / kTokens; }
  int64_t panels() const { return (width + kColumns - 1) / kColumns; }
  int64_t inputs() const { return matrix.inputs / matrix.groups; }  // of a group
  // The part's first column, for an input of a group.
  const int8_t* weight(int64_t group, int64_t input) const {
    return matrix.weight + (group * inputs() + input) * matrix.outputs + first;
  }
  // The next `rows` inputs from this one on, across groups.
  Ahead Next(int64_t group, int64_t input, int64_t rows) const {
    int64_t left = matrix.inputs - group * inputs() - input;
    return Ahead(weight(group, input), matrix.outputs, std::min(rows, left), width);
  }
};

// Initializes the sums for AddAllLines: corrects for the 128 that it adds to the weights.
inline void BeginSums(const Part& part, int64_t group, int32_t* sums) {
  for (int64_t p = 0; p < part.panels(); ++p) {
    for (int64_t t = 0; t < part.tiles(); ++t, sums += kPanelSums) {
      const int32_t* totals = part.x.totals(part.first_tile + t, group);
      for (int64_t r = 0; r < kColumns; ++r) {
        _mm512_store_si512(sums + r * kLanes, _mm512_set1_epi32(-128 * totals[r % kSide]));
      }
    }
  }
}

// Adds products with a panel's lines to the sums of all tiles of a part, by dot products.
inline void AddDotsOfTiles(const Part& part, int64_t group, int64_t input, const int8_t* arranged,
                           int64_t lines, int32_t* sums) {
  constexpr std::array add{&AddAllLines<1>, &AddAllLines<2>, &AddAllLines<3>, &AddAllLines<4>};
  for (int64_t t = 0; t < part.tiles(); ++t) {
    const int8_t* tile = part.x.tile(part.first_tile + t, group, input / kDepth) + input % kDepth;
    int64_t rows = std::min(kTokens, part.rows - t * kTokens);
    add[rows - 1](tile, arranged, lines, sums + t * kPanelSums);
  }
}

// sums [panels][tiles][4][16][16] of a few rows with a group of a matrix: a panel at a time.
inline void MultiplyByPanel(const Part& part, int64_t group, int32_t* sums) {
  alignas(kLine) int8_t arranged[kPanelBytes];
  BeginSums(part, group, sums);
  for (int64_t i = 0, count; i < part.inputs(); i += count) {
    count = std::min(kStrip, part.inputs() - i);
    Ahead ahead = part.Next(group, i + count, part.width < kWide ? count : 0);
    const int8_t* weight = part.weight(group, i);
    for (int64_t c = 0; c < part.width; c += kColumns) {
      Arrange(weight + c, part.matrix.outputs, count, part.width - c, arranged);
      ahead.Ask(count);
      AddDotsOfTiles(part, group, i, arranged, (count + 3) / 4,
                     sums + c / kColumns * part.tiles() * kPanelSums);
    }
  }
}

// The same for many rows. First, the weights of a part are rearranged in memory order: between
// products, the processor would not prefetch.
inline void MultiplyMany(const Part& part, int64_t group, bool by_tiles, int32_t* sums) {
  static thread_local Memory memory;
  int64_t panels = part.panels(), blocks = part.x.blocks();
  int64_t most = std::clamp<int64_t>(kArranged / (panels * kPanelBytes), 1, blocks);
  int64_t steps = (blocks + most - 1) / most;
  int8_t* arranged = static_cast<int8_t*>(memory.AtLeast(panels * most * kPanelBytes));
  if (!by_tiles) BeginSums(part, group, sums);
  for (int64_t step = 0; step < steps; ++step) {
    int64_t block = step * blocks / steps, depth = (step + 1) * blocks / steps - block;
    int64_t end = std::min(part.inputs(), (block + depth) * kDepth);
    for (int64_t i = block * kDepth, count; i < end; i += count) {
      count = std::min(kStrip, end - i);
      Ahead ahead = part.Next(group, i + count, part.matrix.outputs < kWide ? count : 0);
      const int8_t* weight = part.weight(group, i);
      int8_t* to = arranged + (i / kDepth - block) * kPanelBytes + i % kDepth / 4 * kLine;
      for (int64_t p = 0; p < panels; ++p, weight += kColumns, to += depth * kPanelBytes) {
        ahead.Ask(count);
        Arrange(weight, part.matrix.outputs, count, part.width - p * kColumns, to);
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int8_t* from = arranged + p * depth * kPanelBytes;
      int32_t* to = sums + p * part.tiles() * kPanelSums;
#ifdef KERNELS_AMX
      if (by_tiles) {
        for (int64_t t = 0; t < part.tiles(); ++t, to += kPanelSums) {
          AddTiles(part.x.tile(part.first_tile + t, group, block), from, depth, step == 0, to);
        }
        continue;
      }
#endif
      for (int64_t i = block * kDepth; i < end; i += kDepth, from += kPanelBytes) {
        int64_t lines = (std::min(kDepth, end - i) + 3) / 4;
        AddDotsOfTiles(part, group, i, from, lines, to);
      }
    }
  }
}

// y[r][...] = x[r] @ matrix for the rows and columns of a part. `few`: so few rows that dot
// products are cheaper than tiles.
inline void MultiplyIntegers(const Part& part, bool few, bool by_tiles, float* y,
                             int64_t y_stride) {
  static thread_local Memory memory;
  int64_t tiles = part.tiles(), panels = part.panels();
  int32_t* sums =
      static_cast<int32_t*>(memory.AtLeast(panels * tiles * kPanelSums * sizeof(int32_t)));
  const __m512 base = _mm512_set1_ps(1 << kDigitBits);
#ifdef KERNELS_AMX
  std::optional<Tiles> configured;
  if (by_tiles && !few) configured.emplace(std::min(part.rows, kTokens) * kDigits);
#endif
  for (int64_t group = 0, last = part.matrix.groups - 1; group <= last; ++group) {
    few ? MultiplyByPanel(part, group, sums) : MultiplyMany(part, group, by_tiles, sums);
    const uint16_t* scales = part.matrix.scales + group * part.matrix.outputs + part.first;
    for (int64_t r = 0; r < part.rows; ++r) {
      const __m512 unit = _mm512_set1_ps(part.x.unit(part.first_tile * kTokens + r));
      for (int64_t p = 0; p < panels; ++p) {
        const int32_t* from =
            sums + (p * tiles + r / kTokens) * kPanelSums + r % kTokens * kDigits * kLanes;
        __m512 value[4];
        for (int v = 0; v < 4; ++v, from += kSide * kLanes) {
          value[v] = _mm512_cvtepi32_ps(_mm512_load_si512(from + (kDigits - 1) * kLanes));
          for (int d = kDigits - 2; d >= 0; --d) {
            __m512 digit = _mm512_cvtepi32_ps(_mm512_load_si512(from + d * kLanes));
            value[v] = _mm512_fmadd_ps(value[v], base, digit);
          }
        }
        SortColumns(reinterpret_cast<Lanes*>(value));
        for (int v = 0; v < 4; ++v) {
          int64_t c = p * kColumns + v * kLanes;
          __mmask16 own = First16(part.width - c);
          __m512i halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(own, scales + c));
          __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
          __m512 scaled = _mm512_mul_ps(value[v], scale);
          float* to = y + r * y_stride + c;
          if (group > 0) scaled = _mm512_add_ps(_mm512_maskz_loadu_ps(own, to), scaled);
          if (group == last) scaled = _mm512_mul_ps(scaled, unit);
          _mm512_mask_storeu_ps(to, own, scaled);
        }
      }
    }
  }
}

}  // namespace

#endif
#endif  // KERNELS_INTEGERS_H_
