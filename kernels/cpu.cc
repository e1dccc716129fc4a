// A product of float32 rows with int8 matrices, each row with the matrix of its group.
//
// Decoding on a CPU is bound by memory: a weight should be read once, as int8, in order. XLA writes
// it out as float32 first and reads that. Here it is converted in registers.
//
// The loops are over vectors of 16 numbers, which the compiler maps to what the processor has.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kSums = 4096;  // of a pass over a matrix: they stay in the first-level cache
constexpr int64_t kTask = 4096;  // columns of a task: memory is fastest where it is read in order
constexpr int64_t kLeast = 512;  // columns of a task, however many threads there are
constexpr int64_t kUnroll = 4;   // rows of a matrix that one pass over the sums adds
constexpr int64_t kAhead = 16;   // rows from now, what is asked of memory

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline Lanes Load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

inline void Store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }

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

// sums[r][c] += sum_i x[r][i] * weight[i][c], for `count` rows i of the matrix and `width` columns.
// For any kRows a sum is added up in the same order: a row's bits do not depend on its company.
template <int kRows>
void AddProducts(const float* x, int64_t x_stride, const int8_t* weight, int64_t stride,
                 int64_t count, int64_t width, float (*sums)[kSums / kRows]) {
  int64_t whole = width - width % kLanes;
  int64_t i = 0;
  for (; i + kUnroll <= count; i += kUnroll) {
    const int8_t* w = weight + i * stride;
    for (int64_t c = 0; c < whole; c += kLanes) {
      if (c % 64 == 0) {
        for (int64_t k = 0; k < kUnroll; ++k) __builtin_prefetch(w + (kAhead + k) * stride + c);
      }
      Lanes wide[kUnroll];
      for (int64_t k = 0; k < kUnroll; ++k) wide[k] = Widen(w + k * stride + c);
      for (int r = 0; r < kRows; ++r) {
        Lanes sum = Load(&sums[r][c]);
        for (int64_t k = 0; k < kUnroll; ++k) sum += x[r * x_stride + i + k] * wide[k];
        Store(&sums[r][c], sum);
      }
    }
  }
  // What is left: the columns after the last whole vector, and the rows after the last four.
  auto add = [&](int64_t row, int64_t first) {
    for (int r = 0; r < kRows; ++r) {
      for (int64_t c = first; c < width; ++c) {
        sums[r][c] += x[r * x_stride + row] * static_cast<float>(weight[row * stride + c]);
      }
    }
  };
  for (int64_t row = 0; row < i; ++row) add(row, whole);
  for (int64_t row = i; row < count; ++row) add(row, 0);
}

// y[r][first ... first + width] = x[r] @ matrix, for kRows rows and at most kSums / kRows columns.
template <int kRows>
void Multiply(const float* x, const Matrix& matrix, int64_t first, int64_t width, float* y) {
  float sums[kRows][kSums / kRows];
  float total[kRows][kSums / kRows];
  int64_t count = matrix.inputs / matrix.groups;
  for (int64_t group = 0; group < matrix.groups; ++group) {
    for (int r = 0; r < kRows; ++r) std::fill_n(sums[r], width, 0.0f);
    const int8_t* weight = matrix.weight + group * count * matrix.outputs + first;
    AddProducts<kRows>(x + group * count, matrix.inputs, weight, matrix.outputs, count, width,
                       sums);
    const uint16_t* scales = matrix.scales + group * matrix.outputs + first;
    for (int r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        float scaled = sums[r][c] * FromBfloat16(scales[c]);
        total[r][c] = group == 0 ? scaled : total[r][c] + scaled;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) std::copy_n(total[r], width, y + r * matrix.outputs + first);
}

// Multiplies `rows` rows, as many at a time as there is a loop for. The columns are taken in parts
// narrow enough for their sums; a part of the matrix is then still in the second-level cache when
// the next rows want it.
void MultiplyRows(const float* x, const Matrix& matrix, int64_t rows, int64_t first, int64_t width,
                  float* y) {
  int64_t most = kSums / (rows > 4 ? 8 : rows) / kLanes * kLanes;
  for (int64_t part = first; part < first + width; part += most) {
    int64_t columns = std::min(most, first + width - part);
    int64_t row = 0;
    auto multiply = [&](auto count) {
      Multiply<count>(x + row * matrix.inputs, matrix, part, columns, y + row * matrix.outputs);
      row += count;
    };
    while (rows - row >= 8) multiply(std::integral_constant<int, 8>());
    if (rows - row >= 4) multiply(std::integral_constant<int, 4>());
    if (rows - row == 3) multiply(std::integral_constant<int, 3>());
    if (rows - row == 2) multiply(std::integral_constant<int, 2>());
    if (rows - row == 1) multiply(std::integral_constant<int, 1>());
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
