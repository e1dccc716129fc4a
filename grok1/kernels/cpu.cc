// The operations that take most of the time of decoding on a CPU: products of float32 rows with
// matrices of 8 or 4 bits, each row with the matrix of its group; products with the output table;
// attention.
//
// They are memory-bound: weights should be read once, as stored, in order. XLA first writes int8 to
// memory as float32 and reads that.
//
// Sums are computed in a fixed order, or exactly: a row's bits do not depend on the other rows.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "floats.h"
#include "integers.h"
#include "lanes.h"
#include "mapped_files.h"
#include "nibbles.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Calls work(0) ... work(count - 1), begun in this order, on the threads of the pool and on this
// one, or on this one `alone`; returns when all have finished. It never waits for a task that has
// not started, since the pool may be busy.
template <typename Work>
void ForEach(ffi::ThreadPool& pool, int64_t count, const Work& work, bool alone = false) {
  struct Progress {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> ended{0};
  };
  // Shared with the tasks: one may start after all work is done and this call has returned.
  auto progress = std::make_shared<Progress>();
  auto run = [progress, count, &work] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      work(i);
      progress->ended.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = alone ? 0 : std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  while (progress->ended.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Asks for pieces of files that are missing, on all threads: making room for them takes time.
void AskFor(ffi::ThreadPool& pool, const std::vector<FilePiece>& pieces) {
  std::vector<FilePiece> missing;
  std::copy_if(pieces.begin(), pieces.end(), std::back_inserter(missing), IsMissing);
  if (missing.empty()) return;
  ForEach(pool, missing.size(), [&](int64_t n) { Ask(missing[n]); });
}

// ------------------------------------------------------------------ rows by quantized matrices

constexpr int64_t kTask = 8192;  // columns of a task: memory is fastest when read in order
constexpr int64_t kLeast = 512;  // the fewest columns of a task, for any number of threads

// How rows are multiplied with int8 matrices: by the fastest method (integers with AMX, otherwise
// floats), in integers by dot product instructions only (if available), or in floats. For 4 bits,
// only the last one makes a difference: few rows are otherwise multiplied in integers.
enum Form : int32_t { kFastest = 0, kDots = 1, kFloats = 2 };

// int8 [E, I, O], or [E, I / 2, O] for 4 bits, and bfloat16 [E, J, O]: the matrices of one layer.
struct Stack {
  const int8_t* weight;
  const uint16_t* scales;
  int64_t experts, inputs, outputs, groups, in_byte;

  Matrix Of(int64_t expert) const {
    return {weight + expert * inputs / in_byte * outputs, scales + expert * groups * outputs,
            inputs, outputs, groups, in_byte};
  }
};

// Selects a layer's matrices from those of all layers, [L, E, I, O] or [L, E, I / 2, O], and
// [L, E, J, O].
ffi::Error TakeLayer(const ffi::Buffer<ffi::S8>& weight, const ffi::Buffer<ffi::BF16>& scales,
                     const ffi::Buffer<ffi::S32>& layer, int64_t in_byte, Stack* stack) {
  auto shape = weight.dimensions(), scale_shape = scales.dimensions();
  if (shape.size() != 4 || scale_shape.size() != 4 || layer.element_count() != 1) {
    return ffi::Error::InvalidArgument("expected a weight [L, E, I, O], scales and a layer");
  }
  bool fits = (in_byte == 1 || in_byte == 2) && scale_shape[0] == shape[0] &&
              scale_shape[1] == shape[1] && scale_shape[3] == shape[3] && scale_shape[2] > 0 &&
              shape[2] % scale_shape[2] == 0;
  if (!fits) return ffi::Error::InvalidArgument("the scales do not fit the weight");
  int64_t l = layer.typed_data()[0];
  if (l < 0 || l >= shape[0]) return ffi::Error::InvalidArgument("there is no such layer");
  *stack = {weight.typed_data() + l * shape[1] * shape[2] * shape[3],
            reinterpret_cast<const uint16_t*>(scales.untyped_data()) +
                l * shape[1] * scale_shape[2] * shape[3],
            shape[1], in_byte * shape[2], shape[3], scale_shape[2], in_byte};
  return ffi::Error::Success();
}

// What rows of x are written as; of a thread, also when others write it.
struct Written {
#ifdef KERNELS_NIBBLES
  Pieces pieces;
#endif
#ifdef KERNELS_INTEGERS
  Digits digits;
#endif
};

// Rows of x, sorted by expert, and their product with the experts' matrices.
class Rows {
 public:
  struct Run {
    int64_t expert, first, count;  // rows first ... first + count of x
    int64_t tile;                  // the first tile of its digits
    int64_t partial = 0;           // the first row of its slabs' partial sums
  };

  // x [rows, I], of which nothing is read yet; start [E + 1]: the first row of each expert, then the
  // end of the last expert's rows.
  Rows(ffi::ThreadPool& pool, const float* x, int64_t rows, const int32_t* start,
       const Stack& stack, Form form, Written* written)
      : pool_(pool), x_(x), inputs_(stack.inputs), outputs_(stack.outputs),
        in_byte_(stack.in_byte) {
    int64_t tiles = 0;
    for (int64_t e = 0; e < stack.experts; ++e) {
      int64_t count = start[e + 1] - start[e];
      if (count == 0) continue;
      runs_.push_back({e, start[e], count, tiles});
      tiles += (count + kTokens - 1) / kTokens;
    }
#ifdef KERNELS_AMX
    by_tiles_ = form == kFastest && HasTiles();
#endif
#ifdef KERNELS_NIBBLES
    if (stack.in_byte == 2 && form != kFloats && rows <= kFewRows) {
      pieces_ = &written->pieces;
      pieces_->Resize(rows, stack.Of(0));
    }
#endif
#ifdef KERNELS_INTEGERS
    if (stack.in_byte == 1 && (by_tiles_ || form == kDots)) {
      digits_ = &written->digits;
      digits_->Resize(tiles, inputs_, stack.groups);
    }
#endif
  }

  // Adds the parts of a stack that are used and are in files.
  void AddPiecesOf(const Stack& stack, std::vector<FilePiece>* pieces) const {
    for (const Run& run : runs_) {
      Matrix matrix = stack.Of(run.expert);
      AddPieces(matrix.weight, matrix.inputs / matrix.in_byte * matrix.outputs, pieces);
      AddPieces(matrix.scales, matrix.groups * matrix.outputs * sizeof(uint16_t), pieces);
    }
  }

  // y [M, O] = x @ the matrices of a stack. With a second stack of the same shapes, finish(y,
  // other, width) is called for each part of a row of y and of the second stack's product.
  template <typename Finish>
  void Multiply(const Stack& stack, const Stack* second, float* y, const Finish& finish) {
    Write(stack);
    Slabs slabs(stack.Of(0));
    std::vector<Task> tasks, sums;
    ShareOut(slabs, second ? 2 : 1, &tasks, &sums);
    void* memory = partials_.AtLeast(partial_rows_ * outputs_ * sizeof(float));
    auto* partial = static_cast<float*>(memory);
    ForEach(pool_, tasks.size(), [&](int64_t t) {
      const Task& task = tasks[t];
      if (task.slab >= 0) {
        MultiplySlabOf(task, slabs, stack, 0, partial);
        if (second) MultiplySlabOf(task, slabs, *second, 1, partial);
      } else {
        MultiplyColumns(task, stack, second, y, finish);
      }
    });
    if (sums.empty()) return;
    constexpr int64_t kAlone = 16 * 1024;  // partial sums that this thread adds alone
    auto add = [&](int64_t t) { AddSlabs(sums[t], slabs, second, partial, y, finish); };
    ForEach(pool_, sums.size(), add, partial_rows_ * outputs_ <= kAlone);
  }

#ifdef KERNELS_NIBBLES
  // Whether there are few rows, of 4 bits.
  bool few() const { return pieces_; }

  // Multiply for two stacks, to hidden, and then for these rows of hidden, `next`, and a third one,
  // to y. All rows are few. An expert's products do not wait for those of other experts.
  template <typename Finish>
  void MultiplyFewTwice(const Stack& stack, const Stack& second, float* hidden,
                        const Finish& finish, Rows* next, const Stack& third, float* y) {
    Write(stack);
    std::vector<Task> tasks, last, none;
    ShareOut(Slabs(stack.Of(0)), 2, &tasks, &none);
    next->ShareOut(Slabs(third.Of(0)), 1, &last, &none);
    // Of each run: the tasks that have not ended, and one for writing its rows of hidden.
    std::vector<std::atomic<int64_t>> left(runs_.size());
    for (const Task& task : tasks) ++left[task.run - runs_.data()];
    for (auto& own : left) ++own;
    int64_t products = tasks.size(), all = products + last.size();
    ForEach(pool_, all, [&](int64_t t) {
      const Task& task = t < products ? tasks[t] : last[t - products];
      auto& own = left[task.run - (t < products ? this : next)->runs_.data()];
      if (t < products) {
        MultiplyColumns(task, stack, &second, hidden, finish);
        if (--own > 1) return;
        next->WritePieces(task.run->first, task.run->count, third.Of(0));
        own = 0;
      } else {  // what it waits for has started
        while (own > 0) std::this_thread::yield();
        next->MultiplyColumns(task, third, nullptr, y, finish);
      }
    });
  }
#endif

 private:
  // Some columns of a run's product: with the full matrix, or with one slab.
  struct Task {
    const Run* run;
    int64_t slab;  // -1: all
    int64_t first, width;
  };

  // Divides the work into tasks. Few rows are multiplied slab by slab: memory is fastest when read
  // in order. The slabs' partial sums of many rows would be larger than their weights. `sums` are
  // the tasks that follow when all slabs are done.
  void ShareOut(const Slabs& slabs, int64_t weights, std::vector<Task>* tasks,
                std::vector<Task>* sums) {
    // Wide tasks, unless there would be too few for all threads. There may be no pool.
    int64_t threads = std::max<int64_t>(pool_.num_threads(), 1), runs = runs_.size();
    auto add = [&](std::vector<Task>* to, const Run& run, int64_t slab, int64_t width) {
      for (int64_t first = 0; first < outputs_; first += width) {
        to->push_back({&run, slab, first, std::min(width, outputs_ - first)});
      }
    };
    auto share = [&](int64_t parts) {
      return std::max((parts * outputs_ / threads + 63) / 64 * 64, kLeast);
    };
    partial_rows_ = 0;
    for (Run& run : runs_) {
      int64_t most = MostColumns(run.count);
      if (!BySlabs(run, slabs)) {
        add(tasks, run, -1, std::min(share(runs), most));
        continue;
      }
      run.partial = partial_rows_;
      partial_rows_ += weights * slabs.count * run.count;
      for (int64_t slab = 0; slab < slabs.count; ++slab) {
        add(tasks, run, slab, std::min(share(runs * slabs.count), most));
      }
      add(sums, run, -1, kLeast);
    }
    std::stable_sort(tasks->begin(), tasks->end(), [](const Task& a, const Task& b) {
      return a.run->count > b.run->count;  // the longest first
    });
  }

  bool BySlabs(const Run& run, const Slabs& slabs) const {
    constexpr int64_t kInputs = 192;  // the fewest inputs of a slab, for each row
    if (in_byte_ == 2) return false;
#ifdef KERNELS_INTEGERS
    if (digits_) return false;
#endif
    return slabs.count > 1 && run.count * kInputs * slabs.count <= inputs_;
  }

  // The partial sums of slab `slab` of the stack `which` for a run's rows, [count, O].
  float* Partial(const Run& run, const Slabs& slabs, int64_t which, int64_t slab,
                 float* partial) const {
    return partial + (run.partial + (which * slabs.count + slab) * run.count) * outputs_;
  }

  void MultiplySlabOf(const Task& task, const Slabs& slabs, const Stack& stack, int64_t which,
                      float* partial) const {
    const Run& run = *task.run;
    float* to = Partial(run, slabs, which, task.slab, partial) + task.first;
    MultiplySlab(x_ + run.first * inputs_, run.count, stack.Of(run.expert), slabs, task.slab,
                 task.first, task.width, false, to, outputs_);
  }

  template <typename Finish>
  void AddSlabs(const Task& task, const Slabs& slabs, bool second, float* partial, float* y,
                const Finish& finish) const {
    float other[kLeast];
    for (int64_t r = 0; r < task.run->count; ++r) {
      auto add = [&](int64_t which, float* to) {
        for (int64_t slab = 0; slab < slabs.count; ++slab) {
          const float* own =
              Partial(*task.run, slabs, which, slab, partial) + r * outputs_ + task.first;
          for (int64_t c = 0; c < task.width; ++c) to[c] = slab > 0 ? to[c] + own[c] : own[c];
        }
      };
      float* to = y + (task.run->first + r) * outputs_ + task.first;
      add(0, to);
      if (!second) continue;
      add(1, other);
      finish(to, other, task.width);
    }
  }

  template <typename Finish>
  void MultiplyColumns(const Task& task, const Stack& stack, const Stack* second, float* y,
                       const Finish& finish) const {
    static thread_local Memory memory;
    const Run& run = *task.run;
    int64_t chunks = (run.count + kRows - 1) / kRows;
    int64_t chunk = ((run.count + chunks - 1) / chunks + kTokens - 1) / kTokens * kTokens;
    for (int64_t row = 0; row < run.count; row += chunk) {
      int64_t count = std::min(chunk, run.count - row);
      float* to = y + (run.first + row) * outputs_ + task.first;
      const int8_t* then = second ? second->Of(run.expert).weight + task.first : nullptr;
      MultiplyPart(task, row, count, stack.Of(run.expert), then, to, outputs_);
      if (!second) continue;
      float* other = static_cast<float*>(memory.AtLeast(count * task.width * sizeof(float)));
      MultiplyPart(task, row, count, second->Of(run.expert), nullptr, other, task.width);
      for (int64_t r = 0; r < count; ++r) {
        finish(to + r * outputs_, other + r * task.width, task.width);
      }
    }
  }

  // y[r][...] = x[run.first + row + r] @ a task's columns of a matrix, for `count` rows. then: the
  // weights that are multiplied next, or null.
  void MultiplyPart(const Task& task, int64_t row, int64_t count, const Matrix& matrix,
                    const int8_t* then, float* y, int64_t y_stride) const {
    row += task.run->first;
#ifdef KERNELS_NIBBLES
    if (pieces_) {
      FewRows few{*pieces_, row, count, matrix, task.first, task.width, then};
      return MultiplyFew(few, y, y_stride);
    }
#endif
#ifdef KERNELS_INTEGERS
    if (digits_) {
      int64_t tile = task.run->tile + (row - task.run->first) / kTokens;
      Part part{*digits_, tile, count, matrix, task.first, task.width};
      MultiplyIntegers(part, count <= kFew, by_tiles_, y, y_stride);
      return;
    }
#endif
    auto multiply = in_byte_ == 2 ? MultiplyConverted : MultiplyFloats;
    multiply(x_ + row * inputs_, count, matrix, task.first, task.width, y, y_stride);
  }

  static constexpr int64_t kFew = 2;

  // The columns of a part of `count` rows, so that its sums stay in cache.
  int64_t MostColumns(int64_t count) const {
    int64_t sums = kFloatSums / std::min(count, kRows);
#ifdef KERNELS_INTEGERS
    if (digits_) sums = kAllSums / ((std::min(count, kRows) + kTokens - 1) / kTokens * kSide);
    if (digits_ && count > kFew) return EvenColumns(std::min(sums, kTask / 2));
#endif
    return EvenColumns(std::min(sums, kTask));
  }

  // The columns of a part if none may have more than `most`.
  int64_t EvenColumns(int64_t most) const {
    int64_t parts = (outputs_ + most - 1) / most;
    return ((outputs_ + parts - 1) / parts + 63) / 64 * 64;
  }

  // Writes x in the form in which it is multiplied, if that is not its own.
  void Write(const Stack& stack) {
#ifdef KERNELS_NIBBLES
    if (pieces_) {
      constexpr int64_t kAlone = 2048;  // numbers that this thread writes alone
      int64_t end = runs_.empty() ? 0 : runs_.back().first + runs_.back().count;
      ForEach(pool_, end, [&](int64_t r) { WritePieces(r, 1, stack.Of(0)); },
              end * inputs_ <= kAlone);
    }
#endif
#ifdef KERNELS_INTEGERS
    if (digits_) WriteDigits();
#endif
  }

#ifdef KERNELS_NIBBLES
  void WritePieces(int64_t first, int64_t count, const Matrix& matrix) {
    for (int64_t r = first; r < first + count; ++r) pieces_->Write(r, x_ + r * inputs_, matrix);
  }

  static constexpr int64_t kFewRows = kRegisters == 32 ? 64 : 16;  // of x, of all experts
  Pieces* pieces_ = nullptr;
#endif
#ifdef KERNELS_INTEGERS
  void WriteDigits() {
    std::vector<std::pair<int64_t, int64_t>> rows;  // of each tile: the first, and how many
    for (const Run& run : runs_) {
      for (int64_t row = 0; row < run.count; row += kTokens) {
        rows.push_back({run.first + row, std::min(kTokens, run.count - row)});
      }
    }
    constexpr int64_t kAlone = 64 * 1024;  // numbers that this thread writes alone
    int64_t tiles = rows.size();
    auto write = [&](int64_t t) {
      digits_->Write(t, x_ + rows[t].first * inputs_, rows[t].second);
    };
    ForEach(pool_, tiles, write, tiles * inputs_ * kTokens <= kAlone);
  }

  Digits* digits_ = nullptr;
#endif
  ffi::ThreadPool& pool_;
  const float* x_;
  int64_t inputs_, outputs_, in_byte_;
  std::vector<Run> runs_;
  bool by_tiles_ = false;
  int64_t partial_rows_ = 0;
  static thread_local Memory partials_;
};

thread_local Memory Rows::partials_;

// Checks that x [M, I] and y [M, O] fit the matrices, and `starts` [E + 1] the rows; zeroes the
// rows of y that have no expert.
ffi::Error CheckRows(const ffi::Buffer<ffi::F32>& x, const Stack& stack,
                     const ffi::Buffer<ffi::S32>& starts, ffi::ResultBuffer<ffi::F32>& y) {
  auto shape = x.dimensions();
  bool fits = shape.size() == 2 && shape[1] == stack.inputs &&
              y->element_count() == static_cast<size_t>(shape[0] * stack.outputs) &&
              starts.element_count() == static_cast<size_t>(stack.experts + 1);
  if (!fits) return ffi::Error::InvalidArgument("the shapes of a grouped product do not fit");
  const int32_t* start = starts.typed_data();
  for (int64_t e = 0; e < stack.experts; ++e) {
    if (start[e] < 0 || start[e] > start[e + 1] || start[e + 1] > shape[0]) {
      return ffi::Error::InvalidArgument("groups must begin one after the other");
    }
  }
  float* to = y->typed_data();
  std::fill_n(to, start[0] * stack.outputs, 0.0f);
  std::fill(to + start[stack.experts] * stack.outputs, to + shape[0] * stack.outputs, 0.0f);
  return ffi::Error::Success();
}

// x float32 [M, I], its rows sorted by expert; weight int8 [L, E, I / in_byte, O]; scales bfloat16
// [L, E, J, O]; starts int32 [E + 1], the first row of each expert, then the end of the last one's;
// layer int32 []. y float32 [M, O] = x @ weight, zero if a row has no expert.
ffi::Error GroupedProductImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                              ffi::Buffer<ffi::S8> weight, ffi::Buffer<ffi::BF16> scales,
                              ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> layer,
                              int32_t form, int32_t in_byte, ffi::ResultBuffer<ffi::F32> y) {
  Stack stack;
  if (auto error = TakeLayer(weight, scales, layer, in_byte, &stack); error.failure()) return error;
  if (auto error = CheckRows(x, stack, starts, y); error.failure()) return error;
  static thread_local Written written;
  Rows rows(pool, x.typed_data(), x.dimensions()[0], starts.typed_data(), stack,
            static_cast<Form>(form), &written);
  std::vector<FilePiece> pieces;
  rows.AddPiecesOf(stack, &pieces);
  AskFor(pool, pieces);
  rows.Multiply(stack, nullptr, y->typed_data(), [](float*, const float*, int64_t) {});
  return ffi::Error::Success();
}

// gate[c] = gelu(gate[c]) * value[c], gelu in its tanh approximation: z sigmoid(2 u(z)).
void Gate(float* gate, const float* value, int64_t width) {
  auto gated = [](Lanes z, Lanes value) {
    Lanes u = z * (1.0f + 0.044715f * z * z) * (-2 * 0.7978845608f);
    Lanes small = u > 80.0f ? Lanes{} + 80.0f : u;
    small = small < -80.0f ? Lanes{} - 80.0f : small;
    Lanes below = 1.0f + Exp(small, 0.0f);
    below = u > 80.0f ? Lanes{} + INFINITY : below;  // z may have any magnitude
    return z / below * value;
  };
  for (int64_t c = 0; c < width; c += kLanes) {
    if (width - c >= kLanes) {
      Store(gate + c, gated(Load(gate + c), Load(value + c)));
      continue;
    }
    float few[2][kLanes] = {};
    std::copy_n(gate + c, width - c, few[0]);
    std::copy_n(value + c, width - c, few[1]);
    Store(few[0], gated(Load(few[0]), Load(few[1])));
    std::copy_n(few[0], width - c, gate + c);
  }
}

// Like GroupedProduct, with weights [L, E, D, F] and [L, E, F, D]: hidden float32 [M, F] is
// gelu(x @ gate) * (x @ value), `rounded` to bfloat16 or not, and y float32 [M, D] = hidden @ out.
ffi::Error ExpertsImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> gate,
                       ffi::Buffer<ffi::BF16> gate_scales, ffi::Buffer<ffi::S8> value,
                       ffi::Buffer<ffi::BF16> value_scales, ffi::Buffer<ffi::S8> out,
                       ffi::Buffer<ffi::BF16> out_scales, ffi::Buffer<ffi::S32> starts,
                       ffi::Buffer<ffi::S32> layer, int32_t form, int32_t in_byte, bool rounded,
                       ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> hidden) {
  Stack gates, values, outs;
  auto take = [&](auto& weight, auto& scales, Stack* stack) {
    return TakeLayer(weight, scales, layer, in_byte, stack);
  };
  if (auto error = take(gate, gate_scales, &gates); error.failure()) return error;
  if (auto error = take(value, value_scales, &values); error.failure()) return error;
  if (auto error = take(out, out_scales, &outs); error.failure()) return error;
  bool fits = gates.experts == values.experts && gates.inputs == values.inputs &&
              gates.outputs == values.outputs && gates.groups == values.groups &&
              gates.experts == outs.experts;
  if (!fits) return ffi::Error::InvalidArgument("the experts' weights do not fit each other");
  if (auto error = CheckRows(x, gates, starts, hidden); error.failure()) return error;
  if (auto error = CheckRows(*hidden, outs, starts, y); error.failure()) return error;
  static thread_local Written written, hidden_written;
  auto how = static_cast<Form>(form);
  int64_t count = x.dimensions()[0];
  float* made = hidden->typed_data();
  Rows rows(pool, x.typed_data(), count, starts.typed_data(), gates, how, &written);
  Rows next(pool, made, count, starts.typed_data(), outs, how, &hidden_written);
  std::vector<FilePiece> pieces, after;
  rows.AddPiecesOf(gates, &pieces);
  rows.AddPiecesOf(values, &pieces);
  next.AddPiecesOf(outs, &pieces);
  AddPiecesAfter(layer.typed_data()[0], gate.dimensions()[0], &after);
  AskFor(pool, pieces);
  AskFor(pool, after);
  auto finish = [rounded](float* gate, const float* value, int64_t width) {
    Gate(gate, value, width);
    for (int64_t c = 0; rounded && c < width; ++c) gate[c] = ToBfloat16(gate[c]);
  };
  bool done = false;
#ifdef KERNELS_NIBBLES
  if (done = rows.few()) {
    rows.MultiplyFewTwice(gates, values, made, finish, &next, outs, y->typed_data());
  }
#endif
  if (!done) {
    rows.Multiply(gates, &values, made, finish);
    next.Multiply(outs, nullptr, y->typed_data(), [](float*, const float*, int64_t) {});
  }
  if (!pieces.empty()) ForEach(pool, pieces.size(), [&](int64_t n) { Drop(pieces[n]); });
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------- rows by an output table

constexpr int64_t kEntries = kRegisters == 32 ? 6 : 3;  // entries of the table, and
constexpr int64_t kTableTile = 4;  // rows of x, multiplied at a time, with their sums in registers
constexpr int64_t kEntryTask = 64 * kEntries;
constexpr int64_t kTableRows = 16;  // rows of x for which the table is read once
constexpr int64_t kPart = 512;  // of the contracted width: entries stay in the first-level cache

// sums[r][v] += x[r][d] * entry[v][d], lane by lane, for kCount rows of x, a tile of entries and
// first <= d < end. `ahead`: whether to prefetch the next kEntries entries in memory.
template <int kCount, typename Element>
void AddDots(const float* x, const Element* const* entry, int64_t width, int64_t first, int64_t end,
             bool ahead, Lanes (*sums)[kEntries]) {
  Lanes sum[kCount][kEntries];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kEntries; ++v) sum[r][v] = sums[r][v];
  }
  for (int64_t d = first; d < end; d += kLanes) {
    Lanes wide[kEntries];
#pragma GCC unroll 8
    for (int v = 0; v < kEntries; ++v) {
      wide[v] = Widen(entry[v] + d);
      if (kCount > 1) Pin(wide[v]);
      if (ahead) __builtin_prefetch(entry[v] + d + kEntries * width, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      Lanes own = Load(x + r * width + d);
#pragma GCC unroll 8
      for (int v = 0; v < kEntries; ++v) sum[r][v] += own * wide[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kEntries; ++v) sums[r][v] = sum[r][v];
  }
}

// y[r][v] = sum_d x[r][d] * table[v][d], for at most kTableRows rows of x and kEntries entries.
template <typename Element>
void MultiplyEntries(const float* x, int64_t rows, const Element* table, int64_t entries,
                     int64_t width, bool ahead, float* y, int64_t y_stride) {
  constexpr std::array add{&AddDots<1, Element>, &AddDots<2, Element>, &AddDots<3, Element>,
                           &AddDots<4, Element>};
  static_assert(add.size() == kTableTile);
  const Element* entry[kEntries];
  for (int64_t v = 0; v < kEntries; ++v) entry[v] = table + std::min(v, entries - 1) * width;
  Lanes sums[kTableRows][kEntries] = {};
  int64_t whole = width - width % kLanes;
  for (int64_t d = 0; d < whole; d += kPart) {
    for (int64_t r = 0; r < rows; r += kTableTile) {
      add[std::min(kTableTile, rows - r) - 1](x + r * width, entry, width, d,
                                              std::min(d + kPart, whole), ahead && r == 0,
                                              sums + r);
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

inline int64_t EntryTasks(int64_t entries) { return (entries + kEntryTask - 1) / kEntryTask; }

// y [rows, entries] = x @ table^T. Then finish(task) is called for each kEntryTask entries.
template <typename Element, typename Finish>
void MultiplyTable(ffi::ThreadPool& pool, const float* x, int64_t rows, const Element* table,
                   int64_t entries, int64_t width, float* y, const Finish& finish) {
  ForEach(pool, EntryTasks(entries), [&](int64_t task) {
    int64_t end = std::min(entries, (task + 1) * kEntryTask);
    for (int64_t v = task * kEntryTask; v < end; v += kEntries) {
      for (int64_t r = 0; r < rows; r += kTableRows) {
        MultiplyEntries(x + r * width, std::min(kTableRows, rows - r), table + v * width,
                        std::min(kEntries, end - v), width, r == 0 && end - v >= 2 * kEntries,
                        y + r * entries + v, entries);
      }
    }
    finish(task);
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
    MultiplyTable(pool, x.typed_data(), rows, elements, entries, width, y->typed_data(),
                  [](int64_t) {});
    return ffi::Error::Success();
  };
  void* data = table.untyped_data();
  std::vector<FilePiece> pieces;
  AddPieces(data, table.size_bytes(), &pieces);
  AskFor(pool, pieces);
  if (table.element_type() == ffi::F32) return multiply(static_cast<const float*>(data));
  if (table.element_type() == ffi::BF16) return multiply(static_cast<const uint16_t*>(data));
  return ffi::Error::InvalidArgument("expected a table of float32 or bfloat16");
}

// Replaces logits y [rows, entries], each up to errors[v] times the length of the row of x from
// exact, by exact ones, where they are or could be among the `count` largest of their row.
// largest [rows, tasks]: of y less its bound, in each kEntryTask entries.
void MakeExact(ffi::ThreadPool& pool, const float* x, int64_t rows, const float* table,
               const float* errors, const float* lengths, int64_t entries, int64_t width,
               int64_t count, std::vector<float> largest, float* y) {
  int64_t tasks = EntryTasks(entries);
  std::vector<float> least(rows, -INFINITY);
  for (int64_t r = 0; r < rows && count <= tasks; ++r) {
    // `count` of them are at least as large as this one, and each is of another entry.
    float* own = largest.data() + r * tasks;
    std::nth_element(own, own + count - 1, own + tasks, std::greater<float>());
    least[r] = own[count - 1];
  }
  ForEach(pool, tasks, [&](int64_t task) {
    int64_t end = std::min(entries, (task + 1) * kEntryTask);
    for (int64_t r = 0; r < rows; ++r) {
      float* own = y + r * entries;
      for (int64_t v = task * kEntryTask; v < end; ++v) {
        if (own[v] + errors[v] * lengths[r] < least[r]) continue;
        const float* entry = table + v * width;
        std::vector<FilePiece> pieces;
        AddPieces(entry, width * sizeof(float), &pieces);
        for (const FilePiece& piece : pieces) Ask(piece);
        MultiplyEntries(x + r * width, 1, entry, 1, width, false, own + v, entries);
      }
    }
  });
}

// x float32 [M, D]; table float32 [V, D]; the same rounded: values int16 [V, D], scales float32
// [V] and errors float32 [V] -> y float32 [M, V], the product with the rounded table; but with the
// table itself for the entries that are, or could be, among the `count` largest of a row.
ffi::Error LikelyLogitsImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                            ffi::Buffer<ffi::F32> table, ffi::Buffer<ffi::S16> values,
                            ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> errors,
                            int32_t count, ffi::ResultBuffer<ffi::F32> y) {
  if (x.dimensions().size() != 2 || table.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("expected x [M, D] and a table [V, D]");
  }
  int64_t rows = x.dimensions()[0], entries = table.dimensions()[0], width = table.dimensions()[1];
  auto vocabulary = static_cast<size_t>(entries);
  bool fits = x.dimensions()[1] == width && values.element_count() == table.element_count() &&
              scales.element_count() == vocabulary && errors.element_count() == vocabulary &&
              y->element_count() == static_cast<size_t>(rows * entries) && count >= 1;
  if (!fits) return ffi::Error::InvalidArgument("the shapes of a rounded table do not fit");
  int64_t tasks = EntryTasks(entries);
  std::vector<float> lengths(rows), largest(rows * tasks);
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t d = 0; d < width; ++d) {
      squares += static_cast<double>(x.typed_data()[r * width + d]) * x.typed_data()[r * width + d];
    }
    lengths[r] = static_cast<float>(std::sqrt(squares));
  }
  const float *scale = scales.typed_data(), *error = errors.typed_data();
  auto finish = [&](int64_t task) {
    int64_t end = std::min(entries, (task + 1) * kEntryTask);
    for (int64_t r = 0; r < rows; ++r) {
      float *own = y->typed_data() + r * entries, most = -INFINITY;
      for (int64_t v = task * kEntryTask; v < end; ++v) {
        own[v] *= scale[v];
        float low = own[v] - error[v] * lengths[r];
        most = low > most ? low : most;
      }
      largest[r * tasks + task] = most;
    }
  };
  std::vector<FilePiece> pieces;
  AddPieces(values.untyped_data(), values.size_bytes(), &pieces);
  AskFor(pool, pieces);
  MultiplyTable(pool, x.typed_data(), rows, values.typed_data(), entries, width, y->typed_data(),
                finish);
  MakeExact(pool, x.typed_data(), rows, table.typed_data(), error, lengths.data(), entries, width,
            count, std::move(largest), y->typed_data());
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------- decoding's attention

constexpr float kSoftCap = 30;  // of Grok-1's scores: so softmax need not subtract the maximum

// exp(cap tanh(score / cap)), with tanh(u) = expm1(2 u) / (expm1(2 u) + 2).
inline Lanes SoftCapped(Lanes score) {
  Lanes twice = score * (2 / kSoftCap);
  twice = twice > 40.0f ? Lanes{} + 40.0f : twice;  // where tanh is one
  twice = twice < -40.0f ? Lanes{} - 40.0f : twice;
  Lanes grown = Exp(twice, 1.0f);
  return Exp(kSoftCap * (grown / (grown + 2.0f)), 0.0f);
}

// Rounds an attention weight to the type of the values that it multiplies.
inline float Round(float weight, const float*) { return weight; }
inline float Round(float weight, const uint16_t*) { return ToBfloat16(weight); }

// scores[r][s] = x[r] . key[s] multiplier, for kCount rows of x and kLanes keys.
template <int kCount, typename Element>
void Score(const float* x, const Element* const* key, int64_t width, float multiplier,
           float* scores) {
  int64_t whole = width - width % kLanes;
  for (int64_t s = 0; s < kLanes; s += kEntries) {
    const Element* entry[kEntries];
    for (int64_t v = 0; v < kEntries; ++v) entry[v] = key[std::min(s + v, kLanes - 1)];
    Lanes sums[kCount][kEntries] = {};
    AddDots<kCount>(x, entry, width, 0, whole, false, sums);
    for (int64_t r = 0; r < kCount; ++r) {
      for (int64_t v = 0; v < std::min(kEntries, kLanes - s); ++v) {
        float total = Sum(sums[r][v]);
        for (int64_t i = whole; i < width; ++i) total += x[r * width + i] * ToFloat(entry[v][i]);
        scores[r * kLanes + s + v] = total * multiplier;
      }
    }
  }
}

// out[r][i] += sum_s weights[r][s] value[s][i], for kCount rows and `count` values.
template <int kCount, typename Element>
void AddWeighted(const float* weights, const Element* const* value, int64_t count, int64_t width,
                 float* out) {
  constexpr int64_t kVectors = 2;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= width; i += kVectors * kLanes) {
    Lanes sum[kCount][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(out + r * width + i + v * kLanes);
    }
    for (int64_t s = 0; s < count; ++s) {
      Lanes wide[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        wide[v] = Widen(value[s] + i + v * kLanes);
        Pin(wide[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] += weights[r * kLanes + s] * wide[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) Store(out + r * width + i + v * kLanes, sum[r][v]);
    }
  }
  for (; i < width; ++i) {
    for (int64_t r = 0; r < kCount; ++r) {
      float total = out[r * width + i];
      for (int64_t s = 0; s < count; ++s) total += weights[r * kLanes + s] * ToFloat(value[s][i]);
      out[r * width + i] = total;
    }
  }
}

// The cache of one sequence for some adjacent key/value heads of `width` each; positions are
// `stride` apart.
template <typename Element>
struct Heads {
  const Element *keys, *values;
  int64_t stride, count, width;
};

// For kCount queries of a head and some positions, adds the values, weighted by
// w = exp(cap tanh(query . key m / cap)), to out [kCount, width] and the weights to total [kCount].
template <int kCount, typename Element>
void AttendBlock(const float* query, const Element* const* key, const Element* const* value,
                 int64_t count, int64_t width, float multiplier, float* out, float* total) {
  float weights[kCount * kLanes];
  Score<kCount>(query, key, width, multiplier, weights);
  for (int r = 0; r < kCount; ++r) {
    float* own = weights + r * kLanes;
    Store(own, SoftCapped(Load(own)));
    for (int64_t s = 0; s < count; ++s) {
      total[r] += own[s];
      own[s] = Round(own[s], value[s]);
    }
  }
  AddWeighted<kCount>(weights, value, count, width, out);
}

// out[k][g] = sum_s w[k][g][s] values[s][k] / sum_s w[k][g][s] over the first `filled` positions
// that are `seen`; zero if there is none. query and out [heads, queries, width].
template <typename Element>
void AttendHeads(const float* query, int64_t queries, const Heads<Element>& heads, const bool* seen,
                 int64_t filled, float multiplier, float* out) {
  constexpr std::array attend{&AttendBlock<1, Element>, &AttendBlock<2, Element>,
                              &AttendBlock<3, Element>, &AttendBlock<4, Element>};
  static_assert(attend.size() == kTableTile);
  constexpr int64_t kOfLine = kLine / sizeof(Element);
  int64_t width = heads.width, ahead = kLanes * heads.stride;
  std::fill_n(out, heads.count * queries * width, 0.0f);
  std::vector<float> total(heads.count * queries);
  for (int64_t s = 0; s < filled;) {
    int64_t position[kLanes], count = 0;
    for (; s < filled && count < kLanes; ++s) {
      if (seen[s]) position[count++] = s;  // other positions may hold NaN
    }
    if (count == 0) break;
    std::fill(position + count, position + kLanes, position[0]);  // scored, but not counted
    bool more = s + kLanes <= filled;
    for (int64_t k = 0; k < heads.count; ++k) {
      const Element *key[kLanes], *value[kLanes];
      for (int64_t n = 0; n < kLanes; ++n) {
        key[n] = heads.keys + position[n] * heads.stride + k * width;
        value[n] = heads.values + position[n] * heads.stride + k * width;
        for (int64_t i = 0; more && i < width; i += kOfLine) {  // needed next
          __builtin_prefetch(key[n] + ahead + i, 0, 2);
          __builtin_prefetch(value[n] + ahead + i, 0, 2);
        }
      }
      for (int64_t g = 0; g < queries; g += kTableTile) {
        int64_t first = k * queries + g;
        attend[std::min(kTableTile, queries - g) - 1](query + first * width, key, value, count,
                                                      width, multiplier, out + first * width,
                                                      &total[first]);
      }
    }
  }
  for (size_t r = 0; r < total.size(); ++r) {
    if (total[r] == 0) continue;
    for (int64_t i = 0; i < width; ++i) out[r * width + i] /= total[r];
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
    // As many heads per task as leave work for all threads: heads are adjacent in memory.
    int64_t wanted = (2 * std::max<int64_t>(pool.num_threads(), 1) + batch - 1) / batch;
    int64_t parts = std::clamp<int64_t>(wanted, 1, heads);
    ForEach(pool, batch * parts, [&](int64_t task) {
      int64_t b = task / parts, part = task % parts;
      int64_t k = part * heads / parts, end = (part + 1) * heads / parts;
      int64_t at = ((l * batch + b) * positions * heads + k) * width;
      Heads<std::decay_t<decltype(*key_data)>> some{key_data + at, value_data + at, heads * width,
                                                    end - k, width};
      int64_t first = (b * heads + k) * queries * width;
      int64_t count = std::clamp<int64_t>(filled.typed_data()[b], 0, positions);
      AttendHeads(query.typed_data() + first, queries, some, mask.typed_data() + b * positions,
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
                                  .Attr<int32_t>("form")
                                  .Attr<int32_t>("in_byte")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(Experts, ExpertsImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("form")
                                  .Attr<int32_t>("in_byte")
                                  .Attr<bool>("rounded")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(TableProduct, TableProductImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LikelyLogits, LikelyLogitsImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("count")
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
