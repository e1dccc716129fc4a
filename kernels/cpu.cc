// A product of float32 rows with int8 matrices, each row with the matrix of its group.
//
// Decoding on a CPU is bound by memory: a weight should be read once, as int8, in order. XLA writes
// it out as float32 first and reads that. Here it is converted in registers.
//
// The loops are over vectors of 16 numbers, which the compiler maps to what the processor has. A
// sum is always added up in the same order: a row's bits do not depend on its company.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kLine = 64;  // bytes that memory gives at a time

// A tile: so many rows times so many vectors of columns, whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int64_t kTile = 6, kVectors = 4;
#else
constexpr int64_t kTile = 2, kVectors = 2;
#endif
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kRows = 64;          // that are multiplied at a time, each weight read once
constexpr int64_t kSums = 128 * 1024;  // of one part: they stay in the second-level cache
constexpr int64_t kTask = 8192;  // columns of a task: memory is fastest where it is read in order
constexpr int64_t kLeast = 512;  // columns of a task, however many threads there are
// Rows of a matrix that are taken at a time: few, so that little is asked of memory at once, unless
// there are so many sums that to load and store them costs more.
constexpr int64_t kLeastDepth = 16, kMostDepth = 64;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Anywhere
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

inline Lanes Load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }

inline void Store(float* to, Lanes lanes) { *reinterpret_cast<Anywhere*>(to) = lanes; }

inline Lanes Widen(const int8_t* from) {
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Lanes>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
  Lanes lanes;
  for (int half = 0; half < 2; ++half) {
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * half));
    __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    std::memcpy(reinterpret_cast<float*>(&lanes) + 8 * half, &wide, sizeof(wide));
  }
  return lanes;
#else
  float wide[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) wide[lane] = from[lane];
  return Load(wide);
#endif
}

inline float FromBfloat16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Calls work(0) ... work(count - 1) on the threads of the pool and on this one; returns when all
// have ended. This one never waits for a task that has not begun: the pool may be busy.
template <typename Work>
void ForEach(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Progress {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> ended{0};
  };
  // Held by the tasks too: one may begin when all work has been done and this call has returned.
  auto progress = std::make_shared<Progress>();
  auto run = [progress, count, &work] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      work(i);
      progress->ended.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  while (progress->ended.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

struct Matrix {
  const int8_t* weight;    // [inputs, outputs]
  const uint16_t* scales;  // bfloat16 [groups, outputs]
  int64_t inputs, outputs, groups;
};

// A block of a matrix that is wanted next: asks memory for it line by line, in the order in which
// it lies there, while something else is multiplied.
class Ahead {
 public:
  Ahead(const int8_t* block, int64_t stride, int64_t rows, int64_t width)
      : row_(block), stride_(stride), rows_(rows), width_(width) {}

  void Ask() {
    if (rows_ <= 0) return;
    __builtin_prefetch(row_ + column_, 0, 2);
    column_ += kLine;
    if (column_ < width_) return;
    column_ = 0;
    row_ += stride_;
    --rows_;
  }

 private:
  const int8_t* row_;
  int64_t stride_, rows_, width_, column_ = 0;
};

// sums[r][c] += sum_i x[r][i] * weight[i][c], for kCount rows of x, `depth` rows i of the matrix
// and the columns of a panel. Unrolled early: otherwise GCC keeps the sums in memory.
template <int kCount>
void AddTile(const float* x, int64_t x_stride, const int8_t* weight, int64_t stride, int64_t depth,
             float* sums, int64_t sums_stride, Ahead* ahead) {
  Lanes sum[kCount][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(sums + r * sums_stride + v * kLanes);
  }
  for (int64_t i = 0; i < depth; ++i) {
    if (ahead) ahead->Ask();
    Lanes wide[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) wide[v] = Widen(weight + i * stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x[r * x_stride + i] * wide[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Store(sums + r * sums_stride + v * kLanes, sum[r][v]);
  }
}

template <size_t... kIndex>
constexpr auto TilesOf(std::index_sequence<kIndex...>) {
  return std::array{&AddTile<static_cast<int>(kIndex) + 1>...};
}
constexpr auto kTiles = TilesOf(std::make_index_sequence<kTile>());  // for 1 ... kTile rows

// The same for `rows` rows and the `width` columns after the last whole panel.
void AddNarrow(const float* x, int64_t x_stride, int64_t rows, const int8_t* weight, int64_t stride,
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

// y[r][first ... first + width] = x[r] @ matrix, for `rows` rows, at most kRows.
void MultiplyPart(const float* x, const Matrix& matrix, int64_t rows, int64_t first, int64_t width,
                  float* y) {
  static thread_local std::vector<float> scratch(kSums);
  float* sums = scratch.data();  // [rows, width]
  int64_t stride = matrix.outputs, whole = width - width % kPanel;
  int64_t tiles = (rows + kTile - 1) / kTile;
  int64_t most = std::clamp(4 * rows, kLeastDepth, kMostDepth);
  for (int64_t group = 0, i = 0; group < matrix.groups; ++group) {
    std::fill_n(sums, rows * width, 0.0f);
    int64_t end = (group + 1) * (matrix.inputs / matrix.groups);
    for (int64_t depth; i < end; i += depth) {
      depth = std::min(most, end - i);
      const int8_t* weight = matrix.weight + i * stride + first;
      int64_t next = std::min(most, matrix.inputs - i - depth);
      Ahead ahead(weight + depth * stride, stride, next, width);
      for (int64_t c = 0; c < whole; c += kPanel) {
        for (int64_t t = 0; t < tiles; ++t) {
          int64_t r = t * rows / tiles, count = (t + 1) * rows / tiles - r;
          kTiles[count - 1](x + r * matrix.inputs + i, matrix.inputs, weight + c, stride, depth,
                            sums + r * width + c, width, t == 0 ? &ahead : nullptr);
        }
      }
      AddNarrow(x + i, matrix.inputs, rows, weight + whole, stride, depth, width - whole,
                sums + whole, width);
    }
    const uint16_t* scales = matrix.scales + group * stride + first;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = y + r * stride + first;
      for (int64_t c = 0; c < width; ++c) {
        float scaled = sums[r * width + c] * FromBfloat16(scales[c]);
        to[c] = group == 0 ? scaled : to[c] + scaled;
      }
    }
  }
}

// Multiplies `rows` rows with `width` columns of a matrix.
void MultiplyRows(const float* x, const Matrix& matrix, int64_t rows, int64_t first, int64_t width,
                  float* y) {
  int64_t chunks = (rows + kRows - 1) / kRows;
  int64_t most = kSums / std::min(rows, kRows) / kPanel * kPanel;
  for (int64_t part = first; part < first + width; part += most) {
    int64_t columns = std::min(most, first + width - part);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int64_t r = chunk * rows / chunks, count = (chunk + 1) * rows / chunks - r;
      MultiplyPart(x + r * matrix.inputs, matrix, count, part, columns, y + r * matrix.outputs);
    }
  }
}

// x float32 [M, I], its rows sorted by group; weight int8 [L, E, I, O]; scales bfloat16
// [L, E, J, O]; starts int32 [E + 1], where in x each group begins, the last where all end; layer
// int32 []. y float32 [M, O]: zero after the last group.
ffi::Error GroupedProductImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                              ffi::Buffer<ffi::S8> weight, ffi::Buffer<ffi::BF16> scales,
                              ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> layer,
                              ffi::ResultBuffer<ffi::F32> y) {
  auto shape = weight.dimensions();
  auto scale_shape = scales.dimensions();
  if (shape.size() != 4 || scale_shape.size() != 4 || x.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("expected x [M, I], weight [L, E, I, O], scales");
  }
  int64_t layers = shape[0], groups = shape[1], inputs = shape[2], outputs = shape[3];
  int64_t scale_groups = scale_shape[2], rows = x.dimensions()[0];
  bool fits = x.dimensions()[1] == inputs &&
              y->element_count() == static_cast<size_t>(rows * outputs) &&
              scale_shape[0] == layers && scale_shape[1] == groups && scale_shape[3] == outputs &&
              scale_groups > 0 && inputs % scale_groups == 0 && layer.element_count() == 1 &&
              starts.element_count() == static_cast<size_t>(groups + 1);
  if (!fits) return ffi::Error::InvalidArgument("the shapes of a grouped product do not fit");
  const int32_t* start = starts.typed_data();
  int64_t l = layer.typed_data()[0];
  if (l < 0 || l >= layers) return ffi::Error::InvalidArgument("there is no such layer");
  std::vector<int64_t> used;
  for (int64_t e = 0; e < groups; ++e) {
    if (start[e] < 0 || start[e] > start[e + 1] || start[e + 1] > rows) {
      return ffi::Error::InvalidArgument("groups must begin one after the other");
    }
    if (start[e] < start[e + 1]) used.push_back(e);
  }
  const float* from = x.typed_data();
  float* to = y->typed_data();
  const int8_t* weights = weight.typed_data() + l * groups * inputs * outputs;
  const uint16_t* all_scales = reinterpret_cast<const uint16_t*>(scales.untyped_data()) +
                               l * groups * scale_groups * outputs;
  std::fill_n(to, start[0] * outputs, 0.0f);
  std::fill(to + start[groups] * outputs, to + rows * outputs, 0.0f);
  // Wide parts, unless there would be too few for all threads. A pool may not be there at all.
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t share = static_cast<int64_t>(used.size()) * outputs / threads;
  int64_t width = std::clamp((share + 63) / 64 * 64, kLeast, kTask);
  int64_t parts = (outputs + width - 1) / width;
  ForEach(pool, static_cast<int64_t>(used.size()) * parts, [&](int64_t task) {
    int64_t e = used[task / parts], first = task % parts * width;
    Matrix matrix{weights + e * inputs * outputs, all_scales + e * scale_groups * outputs, inputs,
                  outputs, scale_groups};
    MultiplyRows(from + start[e] * inputs, matrix, start[e + 1] - start[e], first,
                 std::min(width, outputs - first), to + start[e] * outputs);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedProduct, GroupedProductImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
