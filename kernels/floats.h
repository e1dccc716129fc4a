// Products of float32 rows with int8 matrices in float32: the form for processors that do not
// multiply int8 four at a time. Each weight is converted in registers.

#ifndef KERNELS_FLOATS_H_
#define KERNELS_FLOATS_H_

#include <algorithm>
#include <array>
#include <utility>

#include "lanes.h"

namespace {

constexpr int64_t kFloatSums = 64 * 1024;  // of a part: they stay in the second-level cache
// Rows of a matrix that are taken at a time: few, so that little is asked of memory at once, unless
// there are so many sums that to load and store them costs more.
constexpr int64_t kLeastDepth = 16, kMostDepth = 64;

// sums[r][c] += sum_i x[i][r] * weight[i][c], for kCount rows r of x, `depth` rows i of the matrix
// and the columns of a panel. Unrolled early: otherwise GCC keeps the sums in memory.
template <int kCount, typename Element>
void AddTile(const float* x, const Element* weight, int64_t stride, int64_t depth, float* sums,
             int64_t sums_stride, Ahead* ahead) {
  constexpr int kVectors = VectorsOf(kCount);
  for (int64_t c = 0; c < kPanel; c += kVectors * kLanes) {
    Lanes sum[kCount][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(sums + r * sums_stride + c + v * kLanes);
    }
    for (int64_t i = 0; i < depth; ++i) {
      const Element* from = weight + i * stride + c;
      if (ahead && c == 0) ahead->Ask();
      if (sizeof(Element) == 1) __builtin_prefetch(from + kLine);
      Lanes wide[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        wide[v] = Widen(from + v * kLanes);
        if (kCount > 1) Pin(wide[v]);
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
      for (int v = 0; v < kVectors; ++v) Store(sums + r * sums_stride + c + v * kLanes, sum[r][v]);
    }
  }
}

template <typename Element, size_t... kIndex>
constexpr auto TilesOf(std::index_sequence<kIndex...>) {
  return std::array{&AddTile<static_cast<int>(kIndex) + 1, Element>...};
}
template <typename Element>
constexpr auto kTiles = TilesOf<Element>(std::make_index_sequence<kTile>());  // by rows, from 1

// Calls work(r, count) for each tile of `rows` rows: its first row, and how many.
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

// AddTile for all tiles of `rows` packed rows. A panel that is read more than once is converted once.
inline void AddPanel(const float* packed, int64_t rows, const int8_t* weight, int64_t stride,
                     int64_t depth, float* sums, int64_t sums_stride, Ahead* ahead) {
  if (rows <= kTile) {
    kTiles<int8_t>[rows - 1](packed, weight, stride, depth, sums, sums_stride, ahead);
    return;
  }
  alignas(kLine) float panel[kMostDepth * kPanel];
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      Store(panel + i * kPanel + c, Widen(weight + i * stride + c));
    }
    __builtin_prefetch(weight + i * stride + kLine);
  }
  ForTiles(rows, [&](int64_t r, int64_t count) {
    kTiles<float>[count - 1](packed + r * depth, panel, kPanel, depth, sums + r * sums_stride,
                             sums_stride, r == 0 ? ahead : nullptr);
  });
}

// The same for `rows` rows and the `width` columns after the last whole panel.
inline void AddNarrow(const float* x, int64_t x_stride, int64_t rows, const int8_t* weight, int64_t stride,
               int64_t depth, int64_t width, float* sums, int64_t sums_stride) {
  for (int64_t i = 0; i < depth; ++i) {
    const int8_t* w = weight + i * stride;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        sums[r * sums_stride + c] += x[r * x_stride + i] * static_cast<float>(w[c]);
      }
    }
  }
}

// y[r][first ... first + width] = x[r] @ matrix, for `rows` rows.
inline void MultiplyFloats(const float* x, int64_t rows, const Matrix& matrix, int64_t first,
                           int64_t width, float* y, int64_t y_stride) {
  static thread_local Memory memory;
  float* sums = static_cast<float*>(memory.AtLeast(rows * width * sizeof(float)));
  alignas(kLine) float packed[kRows * kMostDepth];
  int64_t stride = matrix.outputs, whole = width - width % kPanel;
  int64_t most = std::clamp(4 * rows, kLeastDepth, kMostDepth);
  for (int64_t group = 0, i = 0; group < matrix.groups; ++group) {
    std::fill_n(sums, rows * width, 0.0f);
    int64_t end = (group + 1) * (matrix.inputs / matrix.groups);
    for (int64_t depth; i < end; i += depth) {
      depth = std::min(most, end - i);
      const int8_t* weight = matrix.weight + i * stride + first;
      int64_t next = width < kWide ? std::min(most, matrix.inputs - i - depth) : 0;
      Ahead ahead(weight + depth * stride, stride, next, width);
      Pack(x + i, matrix.inputs, rows, depth, packed);
      for (int64_t c = 0; c < whole; c += kPanel) {
        AddPanel(packed, rows, weight + c, stride, depth, sums + c, width, &ahead);
      }
      AddNarrow(x + i, matrix.inputs, rows, weight + whole, stride, depth, width - whole,
                sums + whole, width);
    }
    const uint16_t* scales = matrix.scales + group * stride + first;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = y + r * y_stride;
      for (int64_t c = 0; c < width; ++c) {
        float scaled = sums[r * width + c] * FromBfloat16(scales[c]);
        to[c] = group == 0 ? scaled : to[c] + scaled;
      }
    }
  }
}

}  // namespace

#endif  // KERNELS_FLOATS_H_
