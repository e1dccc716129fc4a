// Products of float32 rows with int8 matrices in float32, for processors without AMX. Each weight
// is converted in registers.

#ifndef KERNELS_FLOATS_H_
#define KERNELS_FLOATS_H_

#include <algorithm>
#include <array>
#include <utility>

#include "lanes.h"

namespace {

constexpr int64_t kFloatSums = 64 * 1024;  // sums of a part: they stay in the second-level cache
constexpr int64_t kSlabs = 4, kSlab = 128;  // fewest slabs of a matrix, fewest inputs of a slab
constexpr int64_t kPanelDepth = 64;  // most inputs that are multiplied at a time

// How the inputs of a matrix are divided into slabs, each within a scale group. Slabs are summed in
// order, for any division of rows, columns and slabs into tasks.
struct Slabs {
  explicit Slabs(const Matrix& matrix)
      : group_inputs(matrix.inputs / matrix.groups),
        each(std::clamp<int64_t>(group_inputs / kSlab, 1, (kSlabs - 1) / matrix.groups + 1)),
        count(matrix.groups * each) {}

  int64_t Group(int64_t slab) const { return slab / each; }
  int64_t Begin(int64_t slab) const {
    return slab / each * group_inputs + slab % each * group_inputs / each;
  }

  int64_t group_inputs, each, count;
};

// sums[r][c] += sum_i x[i][r] * weight[i][c], for kCount rows r of x, `depth` rows i of the matrix
// and the columns of a panel. Unrolled early: otherwise GCC keeps the sums in memory.
template <int kCount, typename Element>
void AddTile(const float* x, const Element* weight, int64_t stride, int64_t depth, float* sums) {
  constexpr int kVectors = VectorsOf(kCount);
  for (int64_t c = 0; c < kPanel; c += kVectors * kLanes) {
    Lanes sum[kCount][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(sums + r * kPanel + c + v * kLanes);
    }
    for (int64_t i = 0; i < depth; ++i) {
      const Element* from = weight + i * stride + c;
      if constexpr (kCount == 1) {  // one by one: there are no registers to hold them all
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          Lanes wide = Widen(from + v * kLanes);
          Pin(wide);
          sum[0][v] += x[i] * wide;
        }
        continue;
      }
      Lanes wide[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        wide[v] = Widen(from + v * kLanes);
        Pin(wide[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] += x[i * kCount + r] * wide[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) Store(sums + r * kPanel + c + v * kLanes, sum[r][v]);
    }
  }
}

template <typename Element, size_t... kIndex>
constexpr auto TilesOf(std::index_sequence<kIndex...>) {
  return std::array{&AddTile<static_cast<int>(kIndex) + 1, Element>...};
}
template <typename Element>
constexpr auto kTiles = TilesOf<Element>(std::make_index_sequence<kTile>());  // by rows, from 1

// Calls work(r, count) for each tile of `rows` rows, with its first row and its number of rows.
template <typename Work>
inline void ForTiles(int64_t rows, const Work& work) {
  int64_t tiles = (rows + kTile - 1) / kTile;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t r = t * rows / tiles;
    work(r, (t + 1) * rows / tiles - r);
  }
}

// Writes x[r][i] of `depth` inputs i, tile by tile, as AddTile reads them.
inline void Pack(const float* x, int64_t x_stride, int64_t rows, int64_t depth, float* to) {
  ForTiles(rows, [&](int64_t first, int64_t count) {
    for (int64_t i = 0; i < depth; ++i) {
      for (int64_t r = first; r < first + count; ++r) *to++ = x[r * x_stride + i];
    }
  });
}

// AddTile for all tiles of `rows` packed rows. A panel for several tiles is converted once.
inline void AddPanel(const float* packed, int64_t rows, const int8_t* weight, int64_t stride,
                     int64_t depth, float* sums) {
  if (rows <= kTile) {
    kTiles<int8_t>[rows - 1](packed, weight, stride, depth, sums);
    return;
  }
  alignas(kLine) float panel[kPanelDepth * kPanel];
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      Store(panel + i * kPanel + c, Widen(weight + i * stride + c));
    }
  }
  ForTiles(rows, [&](int64_t r, int64_t count) {
    kTiles<float>[count - 1](packed + r * depth, panel, kPanel, depth, sums + r * kPanel);
  });
}

// The same for `width` columns, fewer than a panel.
inline void AddNarrow(const float* packed, int64_t rows, const int8_t* weight, int64_t stride,
                      int64_t depth, int64_t width, float* sums) {
  ForTiles(rows, [&](int64_t first, int64_t count) {
    const float* x = packed + first * depth;
    for (int64_t i = 0; i < depth; ++i) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < width; ++c) {
          sums[(first + r) * kPanel + c] +=
              x[i * count + r] * static_cast<float>(weight[i * stride + c]);
        }
      }
    }
  });
}

// The number of inputs that are multiplied at a time. Few rows read a line of weights several
// times; more lines, 4 KiB apart, would evict each other from the first-level cache.
inline int64_t DepthOf(int64_t rows, int64_t stride) {
  if (rows > kTile) return std::min(4 * rows, kPanelDepth);
  return stride % 4096 == 0 ? 8 : 16;
}

// y[r][...] = x[r] @ a slab of a matrix, scaled, for `rows` rows and `width` columns from `first`
// on. add: add to y instead.
inline void MultiplySlab(const float* x, int64_t rows, const Matrix& matrix, const Slabs& slabs,
                         int64_t slab, int64_t first, int64_t width, bool add, float* y,
                         int64_t y_stride) {
  static thread_local Memory memory;
  int64_t stride = matrix.outputs, panels = (width + kPanel - 1) / kPanel;
  float* sums = static_cast<float*>(memory.AtLeast(panels * rows * kPanel * sizeof(float)));
  std::fill_n(sums, panels * rows * kPanel, 0.0f);
  alignas(kLine) float packed[kRows * kPanelDepth];
  int64_t most = DepthOf(rows, stride), end = slabs.Begin(slab + 1);
  for (int64_t i = slabs.Begin(slab), depth; i < end; i += depth) {
    depth = std::min(most, end - i);
    const int8_t* weight = matrix.weight + i * stride + first;
    Ahead ahead(weight + depth * stride, stride, std::min(most, end - i - depth), width);
    Pack(x + i, matrix.inputs, rows, depth, packed);
    for (int64_t p = 0; p < panels; ++p, weight += kPanel) {
      // Prefetched before the tile is multiplied: inside its loop, GCC generates slower code.
      for (int64_t n = 0; n < depth; ++n) {
        __builtin_prefetch(weight + n * stride + kPanel);
        ahead.Ask(1);
      }
      float* own = sums + p * rows * kPanel;
      int64_t columns = width - p * kPanel;
      if (columns >= kPanel) {
        AddPanel(packed, rows, weight, stride, depth, own);
      } else {
        AddNarrow(packed, rows, weight, stride, depth, columns, own);
      }
    }
  }
  const uint16_t* scales = matrix.scales + slabs.Group(slab) * stride + first;
  for (int64_t c = 0; c < width; c += kPanel) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* own = sums + c * rows + r * kPanel;
      float* to = y + r * y_stride + c;
      int64_t n = 0;
      for (int64_t whole = std::min(kPanel, width - c) - kLanes; n <= whole; n += kLanes) {
        Lanes scaled = Load(own + n) * Widen(scales + c + n);
        Pin(scaled);  // rounded here, as when slabs are added later
        Store(to + n, add ? Load(to + n) + scaled : scaled);
      }
      for (; n < std::min(kPanel, width - c); ++n) {
        float scaled = own[n] * FromBfloat16(scales[c + n]);
        Pin(scaled);
        to[n] = add ? to[n] + scaled : scaled;
      }
    }
  }
}

// The same for all slabs.
inline void MultiplyFloats(const float* x, int64_t rows, const Matrix& matrix, int64_t first,
                           int64_t width, float* y, int64_t y_stride) {
  Slabs slabs(matrix);
  for (int64_t slab = 0; slab < slabs.count; ++slab) {
    MultiplySlab(x, rows, matrix, slabs, slab, first, width, slab > 0, y, y_stride);
  }
}

}  // namespace

#endif  // KERNELS_FLOATS_H_
