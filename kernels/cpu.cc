// What decoding on a CPU spends its time on: products of float32 rows with int8 matrices, each row
// with the matrix of its group, and with the output table; attention to a cache.
//
// It is bound by memory: a weight should be read once, as it is stored, in order. XLA writes int8
// out as float32 first and reads that. Here it is converted in registers.
//
// The loops are over vectors of 16 numbers, which the compiler maps to what the processor has. A
// sum is always added up in the same order: a row's bits do not depend on its company.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
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
constexpr int64_t kSums = 64 * 1024;  // of one part: they stay in the second-level cache
constexpr int64_t kTask = 8192;  // columns of a task: memory is fastest where it is read in order
constexpr int64_t kLeast = 512;  // columns of a task, however many threads there are
constexpr int64_t kWide = 4096;  // columns whose rows the processor itself reads ahead
// Rows of a matrix that are taken at a time: few, so that little is asked of memory at once, unless
// there are so many sums that to load and store them costs more.
constexpr int64_t kLeastDepth = 16, kMostDepth = 64;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Anywhere
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

inline Lanes Load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }

inline void Store(float* to, Lanes lanes) { *reinterpret_cast<Anywhere*>(to) = lanes; }

inline float Sum(Lanes lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(lanes));
#else
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
#endif
}

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

inline float ToFloat(float value) { return value; }
inline float ToFloat(uint16_t bits) { return FromBfloat16(bits); }

inline Lanes Widen(const float* from) { return Load(from); }

inline Lanes Widen(const uint16_t* from) {  // bfloat16
#if defined(__AVX512F__)
  __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Lanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
  float wide[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) wide[lane] = FromBfloat16(from[lane]);
  return Load(wide);
#endif
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
template <int kCount, typename Element>
void AddTile(const float* x, int64_t x_stride, const Element* weight, int64_t stride, int64_t depth,
             float* sums, int64_t sums_stride, Ahead* ahead) {
  Lanes sum[kCount][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(sums + r * sums_stride + v * kLanes);
  }
  for (int64_t i = 0; i < depth; ++i) {
    if (ahead) ahead->Ask();
    if (sizeof(Element) == 1) __builtin_prefetch(weight + i * stride + kLine);
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

template <typename Element, size_t... kIndex>
constexpr auto TilesOf(std::index_sequence<kIndex...>) {
  return std::array{&AddTile<static_cast<int>(kIndex) + 1, Element>...};
}
template <typename Element>
constexpr auto kTiles = TilesOf<Element>(std::make_index_sequence<kTile>());  // by rows, from 1

// The same for `rows` rows. A panel that several tiles want is converted once.
void AddPanel(const float* x, int64_t x_stride, int64_t rows, const int8_t* weight, int64_t stride,
              int64_t depth, float* sums, int64_t sums_stride, Ahead* ahead) {
  if (rows <= kTile) {
    kTiles<int8_t>[rows - 1](x, x_stride, weight, stride, depth, sums, sums_stride, ahead);
    return;
  }
  alignas(kLine) float panel[kMostDepth * kPanel];
  for (int64_t i = 0; i < depth; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      Store(panel + i * kPanel + v * kLanes, Widen(weight + i * stride + v * kLanes));
    }
    __builtin_prefetch(weight + i * stride + kLine);
  }
  int64_t tiles = (rows + kTile - 1) / kTile;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t r = t * rows / tiles, count = (t + 1) * rows / tiles - r;
    kTiles<float>[count - 1](x + r * x_stride, x_stride, panel, kPanel, depth,
                             sums + r * sums_stride, sums_stride, t == 0 ? ahead : nullptr);
  }
}

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
  int64_t most = std::clamp(4 * rows, kLeastDepth, kMostDepth);
  for (int64_t group = 0, i = 0; group < matrix.groups; ++group) {
    std::fill_n(sums, rows * width, 0.0f);
    int64_t end = (group + 1) * (matrix.inputs / matrix.groups);
    for (int64_t depth; i < end; i += depth) {
      depth = std::min(most, end - i);
      const int8_t* weight = matrix.weight + i * stride + first;
      int64_t next = width < kWide ? std::min(most, matrix.inputs - i - depth) : 0;
      Ahead ahead(weight + depth * stride, stride, next, width);
      for (int64_t c = 0; c < whole; c += kPanel) {
        AddPanel(x + i, matrix.inputs, rows, weight + c, stride, depth, sums + c, width, &ahead);
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

// ------------------------------------------------------------------------- rows by an output table

constexpr int64_t kEntryTask = 32 * kTile;  // entries of the table
constexpr int64_t kTableRows = 16;           // of x, that are multiplied at a time
constexpr int64_t kPart = 512;  // of the contracted width: entries stay in the first-level cache

// sums[r][v] += x[r][d] * entry[v][d], lane by lane, for kCount rows of x, a tile of entries and
// first <= d < end. `ahead`: whether as many entries follow in memory, which are wanted next.
template <int kCount, typename Element>
void AddDots(const float* x, const Element* const* entry, int64_t width, int64_t first, int64_t end,
             bool ahead, Lanes (*sums)[kTile]) {
  Lanes sum[kCount][kTile];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTile; ++v) sum[r][v] = sums[r][v];
  }
  for (int64_t d = first; d < end; d += kLanes) {
    Lanes wide[kTile];
#pragma GCC unroll 8
    for (int v = 0; v < kTile; ++v) {
      wide[v] = Widen(entry[v] + d);
      if (ahead) __builtin_prefetch(entry[v] + d + kTile * width, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      Lanes own = Load(x + r * width + d);
#pragma GCC unroll 8
      for (int v = 0; v < kTile; ++v) sum[r][v] += own * wide[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTile; ++v) sums[r][v] = sum[r][v];
  }
}

// y[r][v] = sum_d x[r][d] * table[v][d], for at most kTableRows rows of x and kTile entries.
template <typename Element>
void MultiplyEntries(const float* x, int64_t rows, const Element* table, int64_t entries,
                     int64_t width, bool ahead, float* y, int64_t y_stride) {
  constexpr std::array add{&AddDots<1, Element>, &AddDots<2, Element>, &AddDots<3, Element>,
                           &AddDots<4, Element>};
  constexpr int64_t most = std::min<int64_t>(kVectors, add.size());
  const Element* entry[kTile];
  for (int64_t v = 0; v < kTile; ++v) entry[v] = table + std::min(v, entries - 1) * width;
  Lanes sums[kTableRows][kTile] = {};
  int64_t whole = width - width % kLanes;
  for (int64_t d = 0; d < whole; d += kPart) {
    for (int64_t r = 0; r < rows; r += most) {
      add[std::min(most, rows - r) - 1](x + r * width, entry, width, d, std::min(d + kPart, whole),
                                        ahead && r == 0, sums + r);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < entries; ++v) {
      float total = Sum(sums[r][v]);
      for (int64_t d = whole; d < width; ++d) total += x[r * width + d] * ToFloat(entry[v][d]);
      y[r * y_stride + v] = total;
    }
  }
}

template <typename Element>
void MultiplyTable(ffi::ThreadPool& pool, const float* x, int64_t rows, const Element* table,
                   int64_t entries, int64_t width, float* y) {
  ForEach(pool, (entries + kEntryTask - 1) / kEntryTask, [&](int64_t task) {
    int64_t end = std::min(entries, (task + 1) * kEntryTask);
    for (int64_t v = task * kEntryTask; v < end; v += kTile) {
      for (int64_t r = 0; r < rows; r += kTableRows) {
        MultiplyEntries(x + r * width, std::min(kTableRows, rows - r), table + v * width,
                        std::min(kTile, end - v), width, r == 0 && end - v >= 2 * kTile,
                        y + r * entries + v, entries);
      }
    }
  });
}

// x float32 [M, D], table float32 or bfloat16 [V, D] -> y float32 [M, V].
ffi::Error TableProductImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer table,
                            ffi::ResultBuffer<ffi::F32> y) {
  if (x.dimensions().size() != 2 || table.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("expected x [M, D] and a table [V, D]");
  }
  int64_t rows = x.dimensions()[0], entries = table.dimensions()[0], width = table.dimensions()[1];
  if (x.dimensions()[1] != width || y->element_count() != static_cast<size_t>(rows * entries)) {
    return ffi::Error::InvalidArgument("the shapes of a product with a table do not fit");
  }
  auto multiply = [&](auto* elements) {
    MultiplyTable(pool, x.typed_data(), rows, elements, entries, width, y->typed_data());
    return ffi::Error::Success();
  };
  void* data = table.untyped_data();
  if (table.element_type() == ffi::F32) return multiply(static_cast<const float*>(data));
  if (table.element_type() == ffi::BF16) return multiply(static_cast<const uint16_t*>(data));
  return ffi::Error::InvalidArgument("expected a table of float32 or bfloat16");
}

// ---------------------------------------------------------------------------- decoding's attention

constexpr float kSoftCap = 30;  // of Grok-1's scores: a softmax needs no maximum to be subtracted

typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

// exp(x) - less, for |x| <= 80. With x = n ln 2 + r it is 2^n (exp(r) - 1) + (2^n - less), exact to
// a few units in the last place, also near zero if less is one; |r| <= 0.35, for which eight terms
// of exp's series do.
inline Lanes Exp(Lanes x, float less) {
  constexpr float kRound = 3 << 22;  // added and taken away: the nearest whole number
  Lanes n = (x * 1.44269504f + kRound) - kRound;
  Lanes r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  Lanes series = r * (1.0f / 40320) + 1.0f / 5040;
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f}) {
    series = series * r + factor;
  }
  Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Lanes power = reinterpret_cast<Lanes>(bits);
  return power * (series * r) + (power - less);
}

// exp(cap tanh(score / cap)), with tanh(u) = expm1(2 u) / (expm1(2 u) + 2).
inline Lanes SoftCapped(Lanes score) {
  Lanes twice = score * (2 / kSoftCap);
  twice = twice > 40.0f ? Lanes{} + 40.0f : twice;  // there tanh is one
  twice = twice < -40.0f ? Lanes{} - 40.0f : twice;
  Lanes grown = Exp(twice, 1.0f);
  return Exp(kSoftCap * (grown / (grown + 2.0f)), 0.0f);
}

// What a weight becomes before it multiplies values of this type.
inline float Round(float weight, const float*) { return weight; }
inline float Round(float weight, const uint16_t*) {  // to bfloat16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof(bits));
  bits += 0x7fff + ((bits >> 16) & 1);
  return FromBfloat16(static_cast<uint16_t>(bits >> 16));
}

template <typename Element>
float Dot(const float* x, const Element* y, int64_t width) {
  int64_t whole = width - width % kLanes;
  Lanes sum = {};
  for (int64_t i = 0; i < whole; i += kLanes) sum += Load(x + i) * Widen(y + i);
  float total = Sum(sum);
  for (int64_t i = whole; i < width; ++i) total += x[i] * ToFloat(y[i]);
  return total;
}

template <typename Element>
void AddScaled(float scale, const Element* x, int64_t width, float* to) {
  int64_t whole = width - width % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store(to + i, Load(to + i) + scale * Widen(x + i));
  for (int64_t i = whole; i < width; ++i) to[i] += scale * ToFloat(x[i]);
}

// The cache of one sequence and key/value head: rows of `width`, `stride` apart.
template <typename Element>
struct Head {
  const Element *keys, *values;
  int64_t stride, width;
};

// out[g] = sum_s w[g][s] values[s] / sum_s w[g][s], w = exp(cap tanh(query[g] . keys[s] m / cap)),
// over the first `filled` positions that are `seen`; zero if there is none.
template <typename Element>
void AttendHead(const float* query, int64_t queries, const Head<Element>& head, const bool* seen,
                int64_t filled, float multiplier, float* out) {
  int64_t width = head.width;
  std::fill_n(out, queries * width, 0.0f);
  std::vector<float> total(queries);
  for (int64_t first = 0; first < filled; first += kLanes) {
    int64_t count = std::min(kLanes, filled - first);
    for (int64_t g = 0; g < queries; ++g) {
      float weights[kLanes] = {};
      for (int64_t s = 0; s < count; ++s) {
        const Element* key = head.keys + (first + s) * head.stride;
        weights[s] = Dot(query + g * width, key, width) * multiplier;
      }
      Store(weights, SoftCapped(Load(weights)));
      for (int64_t s = 0; s < count; ++s) {
        if (!seen[first + s]) continue;  // what lies there may be no number
        total[g] += weights[s];
        const Element* value = head.values + (first + s) * head.stride;
        AddScaled(Round(weights[s], value), value, width, out + g * width);
      }
    }
  }
  for (int64_t g = 0; g < queries; ++g) {
    if (total[g] == 0) continue;
    for (int64_t i = 0; i < width; ++i) out[g * width + i] /= total[g];
  }
}

// query float32 [B, K, G, H]; keys, values float32 or the bits of bfloat16 [L, B, S, K, H]; mask
// bool [B, S]; layer int32 []; filled int32 [B] -> out float32 [B, K, G, H].
ffi::Error AttendImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys,
                      ffi::AnyBuffer values, ffi::Buffer<ffi::PRED> mask,
                      ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> filled, float multiplier,
                      ffi::ResultBuffer<ffi::F32> out) {
  auto shape = query.dimensions(), cache = keys.dimensions();
  if (shape.size() != 4 || cache.size() != 5 ||
      keys.element_type() != values.element_type() || mask.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("expected a query [B, K, G, H], caches and a mask [B, S]");
  }
  int64_t batch = shape[0], heads = shape[1], queries = shape[2], width = shape[3];
  int64_t positions = cache[2], l = layer.typed_data()[0];
  auto value_shape = values.dimensions();
  bool fits = std::equal(cache.begin(), cache.end(), value_shape.begin(), value_shape.end()) &&
              cache[1] == batch && cache[3] == heads && cache[4] == width &&
              mask.dimensions()[0] == batch && mask.dimensions()[1] == positions &&
              filled.element_count() == static_cast<size_t>(batch) && l >= 0 && l < cache[0] &&
              out->element_count() == query.element_count();
  if (!fits) return ffi::Error::InvalidArgument("the shapes of an attention do not fit");
  auto attend = [&](auto* key_data, auto* value_data) {
    ForEach(pool, batch * heads, [&](int64_t task) {
      int64_t b = task / heads, k = task % heads;
      int64_t at = ((l * batch + b) * positions * heads + k) * width;
      Head<std::decay_t<decltype(*key_data)>> head{key_data + at, value_data + at, heads * width,
                                                   width};
      int64_t first = task * queries * width;
      int64_t count = std::clamp<int64_t>(filled.typed_data()[b], 0, positions);
      AttendHead(query.typed_data() + first, queries, head, mask.typed_data() + b * positions,
                 count, multiplier, out->typed_data() + first);
    });
    return ffi::Error::Success();
  };
  if (keys.element_type() == ffi::F32) {
    return attend(static_cast<const float*>(keys.untyped_data()),
                  static_cast<const float*>(values.untyped_data()));
  }
  if (keys.element_type() == ffi::U16 || keys.element_type() == ffi::BF16) {
    return attend(static_cast<const uint16_t*>(keys.untyped_data()),
                  static_cast<const uint16_t*>(values.untyped_data()));
  }
  return ffi::Error::InvalidArgument("expected a cache of float32 or bfloat16");
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(TableProduct, TableProductImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(Attend, AttendImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("multiplier")
                                  .Ret<ffi::Buffer<ffi::F32>>());
