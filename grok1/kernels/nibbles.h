// Products of float32 rows with matrices of 4 bits: a byte holds two inputs of a column.
//
// Few rows are multiplied in integers, exactly within a piece of a scale group. Many rows are
// multiplied in float32, by weights that are converted once for all of them.

#ifndef KERNELS_NIBBLES_H_
#define KERNELS_NIBBLES_H_

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "floats.h"

namespace {

constexpr int64_t kPiece = 64;  // most inputs of a scale group that are multiplied at a time
constexpr int64_t kSummed = 4;  // pieces whose products are summed before they are added to others

// Calls work(group, input, count) for each piece of a matrix, in order.
template <typename Work>
inline void ForPieces(const Matrix& matrix, const Work& work) {
  int64_t own = matrix.inputs / matrix.groups;
  for (int64_t group = 0; group < matrix.groups; ++group) {
    for (int64_t i = 0; i < own; i += kPiece) {
      work(group, group * own + i, std::min(kPiece, own - i));
    }
  }
}

// The bytes from `input` on, as many as a piece may have, to be prefetched.
inline Ahead NextPiece(const Matrix& matrix, int64_t input, int64_t first, int64_t width) {
  const int8_t* weight = matrix.weight + input / 2 * matrix.outputs + first;
  return Ahead(weight, matrix.outputs, std::min(kPiece, matrix.inputs - input) / 2, width);
}

// The columns of a panel, for a piece. They are copied if there are fewer than kPanel.
class Columns {
 public:
  // weight, scales: the first column, of `count`, of `rows` rows of bytes `outputs` apart. copied:
  // copy also a full panel, since many rows may evict each other from the first-level cache.
  void Take(const int8_t* weight, const uint16_t* scales, int64_t outputs, int64_t rows,
            int64_t count, bool copied) {
    bool whole = count >= kPanel;
    bytes_ = weight, scales_ = scales, stride_ = outputs;
    rows_ = rows, count_ = std::min(count, kPanel);
    if (whole && !copied) return;
    for (int64_t i = 0; i < rows; ++i, weight += outputs) {
      whole ? std::memcpy(own_[i], weight, kPanel) : std::memcpy(own_[i], weight, count);
    }
    std::copy_n(scales, count_, own_scales_);
    bytes_ = own_[0], scales_ = own_scales_, stride_ = kPanel;
  }

  const int8_t* bytes() const { return bytes_; }
  const uint16_t* scales() const { return scales_; }
  int64_t stride() const { return stride_; }
  int64_t rows() const { return rows_; }
  int64_t count() const { return count_; }

 private:
  const int8_t* bytes_;
  const uint16_t* scales_;
  int64_t stride_, rows_, count_;
  alignas(kLine) int8_t own_[kPiece / 2][kPanel] = {};
  uint16_t own_scales_[kPanel] = {};
};

// ------------------------------------------------------------------------------- many, in floats

// panel[i][c] = weight[i][c] * scales[c] for `depth` inputs. Exact: the products have 12 bits.
inline void Convert(const Columns& columns, int64_t depth, float* panel) {
  float scales[kPanel];
  for (int64_t c = 0; c < kPanel; c += kLanes) Store(scales + c, Widen(columns.scales() + c));
  for (int64_t i = 0; i < depth; i += 2, panel += 2 * kPanel) {
    const int8_t* row = columns.bytes() + i / 2 * columns.stride();
#pragma GCC unroll 16
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      Lanes even, odd;
      WidenHalves(row + c, &even, &odd);
      Store(panel + c, even * Load(scales + c));
      Store(panel + kPanel + c, odd * Load(scales + c));
    }
  }
}

// y[r][c] += sums, which become zero, for `rows` rows and `width` columns in panels.
inline void AddSums(int64_t rows, int64_t width, float* sums, float* y, int64_t y_stride) {
  for (int64_t c = 0; c < width; c += kPanel) {
    for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
      float* to = y + r * y_stride + c;
      for (int64_t n = 0; n < std::min(kPanel, width - c); ++n) to[n] += sums[n];
      std::fill_n(sums, kPanel, 0.0f);
    }
  }
}

// y[r][...] = x[r] @ matrix for `rows` rows and `width` columns from `first` on.
inline void MultiplyConverted(const float* x, int64_t rows, const Matrix& matrix, int64_t first,
                              int64_t width, float* y, int64_t y_stride) {
  static thread_local Memory memory;
  int64_t stride = matrix.outputs, panels = (width + kPanel - 1) / kPanel;
  float* sums = static_cast<float*>(memory.AtLeast(panels * rows * kPanel * sizeof(float)));
  std::fill_n(sums, panels * rows * kPanel, 0.0f);
  for (int64_t r = 0; r < rows; ++r) std::fill_n(y + r * y_stride, width, 0.0f);
  alignas(kLine) float packed[kRows * kPiece], panel[kPiece * kPanel];
  Columns columns;
  int64_t pieces = 0;
  ForPieces(matrix, [&](int64_t group, int64_t input, int64_t count) {
    const int8_t* weight = matrix.weight + input / 2 * stride + first;
    const uint16_t* scales = matrix.scales + group * stride + first;
    Ahead ahead = NextPiece(matrix, input + count, first, width);
    Pack(x + input, matrix.inputs, rows, count, packed);
    for (int64_t p = 0, c = 0; p < panels; ++p, c += kPanel) {
      ahead.Ask(kPiece / 2);
      columns.Take(weight + c, scales + c, stride, count / 2, width - c, false);
      Convert(columns, count, panel);
      ForTiles(rows, [&](int64_t r, int64_t tile) {
        float* own = sums + (p * rows + r) * kPanel;
        kTiles<float>[tile - 1](packed + r * count, panel, kPanel, count, own);
      });
    }
    bool end = input + count == matrix.inputs;
    if (++pieces % kSummed == 0 || end) AddSums(rows, width, sums, y, y_stride);
  });
}

// ------------------------------------------------------------------------------ few, in integers

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define KERNELS_NIBBLES 1

// Bytes of a vector register. A line is four of them: four inputs of 4 kLanes columns.
#if defined(__AVX512BW__)
typedef __m512i Bytes;
inline Bytes LoadBytes(const void* from) { return _mm512_loadu_si512(from); }
inline Bytes Spread(int32_t four) { return _mm512_set1_epi32(four); }
inline Bytes HighHalves(Bytes x) { return _mm512_srli_epi16(x, 4); }
inline Bytes FirstBytes(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes LastBytes(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes FirstPairs(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes LastPairs(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline Bytes AddPairs(Bytes sum, Bytes weights, Bytes digits) {
  return _mm512_add_epi16(sum, _mm512_maddubs_epi16(weights, digits));
}
inline Bytes SumOfPairs(Bytes sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
#else
typedef __m256i Bytes;
inline Bytes LoadBytes(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline Bytes Spread(int32_t four) { return _mm256_set1_epi32(four); }
inline Bytes HighHalves(Bytes x) { return _mm256_srli_epi16(x, 4); }
inline Bytes FirstBytes(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes LastBytes(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes FirstPairs(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes LastPairs(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline Bytes AddPairs(Bytes sum, Bytes weights, Bytes digits) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, digits));
}
inline Bytes SumOfPairs(Bytes sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

// Adds four products of each lane: in 32 bits, or in two halves of 16. With digits of seven bits,
// these hold the sums of a piece, at most 32 * 15 * 64 each.
#if defined(__AVX512VNNI__)
constexpr int kHalfDigits = 3, kHalfBits = 8;
inline Bytes AddFours(Bytes sum, Bytes weights, Bytes digits) {
  return _mm512_dpbusd_epi32(sum, weights, digits);
}
inline Integers SumOf(Bytes sum) { return reinterpret_cast<Integers>(sum); }
#else
constexpr int kHalfDigits = 4, kHalfBits = 7;
inline Bytes AddFours(Bytes sum, Bytes weights, Bytes digits) {
  return AddPairs(sum, weights, digits);
}
inline Integers SumOf(Bytes sum) { return reinterpret_cast<Integers>(SumOfPairs(sum)); }
#endif

constexpr int64_t kVectors = 4;  // of a line
constexpr int64_t kStripe = kVectors * kLanes;
constexpr int64_t kLines = kPiece / 4;

// A piece of a row: `unit` times integers of signed digits. Four even inputs precede the odd ones
// between them; their lowest digits come first. totals: eight times the sum of each digit, since
// weights are multiplied with eight added.
struct Piece {
  int8_t digits[kLines][4][4];
  int32_t totals[kHalfDigits];
  float unit;  // NaN if a number is not finite
};

// Writes `count` numbers as a piece; digits of missing ones are zero.
inline void WritePiece(const float* x, int64_t count, Piece* piece) {
  typedef int32_t Eight __attribute__((vector_size(32)));
  constexpr float kLeast = 1e-30f;  // smaller numbers lose digits
  constexpr int32_t kHalf = 1 << (kHalfBits - 1), kFull = (1 << kHalfBits) - 1;
  constexpr float kLargest = (kHalf - 0.6f) * (1 << kHalfBits * (kHalfDigits - 1));
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i by_digit = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  float own[kPiece] = {}, largest = kLeast;
  std::copy_n(x, count, own);
  bool finite = true;
  for (int64_t i = 0; i < kPiece; ++i) {
    finite &= std::abs(own[i]) <= std::numeric_limits<float>::max();
    largest = std::max(largest, std::abs(own[i]));
  }
  const __m256 scale = _mm256_set1_ps(kLargest / largest);
  Eight totals[kHalfDigits] = {};
  for (int64_t i = 0; i < kPiece; i += 8) {
    __m256 sorted = _mm256_permutevar8x32_ps(_mm256_loadu_ps(own + i), order);
    __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(sorted, scale));
    Eight number = reinterpret_cast<Eight>(rounded), bytes = {};
    for (int d = 0; d < kHalfDigits; ++d) {
      bool last = d == kHalfDigits - 1;  // the remainder
      Eight digit = last ? number : ((number + kHalf) & kFull) - kHalf;
      bytes |= (digit & 255) << (8 * d);
      totals[d] += digit;
      number = (number - digit) >> kHalfBits;
    }
    __m256i lines = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(bytes), by_digit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(piece->digits[i / 4]), lines);
  }
  piece->unit = finite ? largest / kLargest : std::numeric_limits<float>::quiet_NaN();
  for (int d = 0; d < kHalfDigits; ++d) {
    piece->totals[d] = 0;
    for (int n = 0; n < 8; ++n) piece->totals[d] += 8 * totals[d][n];
  }
}

// Rows of x in pieces.
class Pieces {
 public:
  void Resize(int64_t rows, const Matrix& matrix) {
    each_ = 0;
    ForPieces(matrix, [&](int64_t, int64_t, int64_t) { ++each_; });
    pieces_ = static_cast<Piece*>(memory_.AtLeast(rows * each_ * sizeof(Piece)));
  }

  void Write(int64_t row, const float* x, const Matrix& matrix) {
    Piece* to = pieces_ + row * each_;
    ForPieces(matrix, [&](int64_t, int64_t input, int64_t count) {
      WritePiece(x + input, count, to++);
    });
  }

  int64_t each() const { return each_; }  // pieces of a row
  const Piece* row(int64_t r) const { return pieces_ + r * each_; }

 private:
  Memory memory_;
  Piece* pieces_;
  int64_t each_;
};

// Two lines of weights with eight added, vectors kFirst ... kFirst + kWidth, of the inputs in four
// rows of bytes: the even ones, and the odd ones.
template <int kFirst, int kWidth>
inline void ReadLines(const Bytes* in, Bytes* even, Bytes* odd) {
  const Bytes sign = Spread(0x08080808), low = Spread(0x0f0f0f0f);
#pragma GCC unroll 4
  for (int v = 0; v < kWidth; ++v) {
    bool last = kFirst + v >= 2, odd_pairs = (kFirst + v) % 2 > 0;
    Bytes a = last ? LastBytes(in[0], in[1]) : FirstBytes(in[0], in[1]);
    Bytes b = last ? LastBytes(in[2], in[3]) : FirstBytes(in[2], in[3]);
    Bytes four = odd_pairs ? LastPairs(a, b) : FirstPairs(a, b);
    even[v] = (four & low) ^ sign;
    odd[v] = (HighHalves(four) & low) ^ sign;
  }
}

// The bytes of a piece of a matrix for kStripe columns, and lines made of them if they are needed
// several times; `ahead`: what is prefetched meanwhile.
struct Stripe {
  const int8_t* bytes;
  int64_t stride, rows;
  const Bytes* lines;
  Ahead* ahead;

  // Loads rows i ... i + 4, for kWidth vectors of a line. The last row is repeated where others are
  // missing: their digits are zero.
  template <int kWidth>
  void Load(int64_t i, Bytes* in) const {
    ahead->Ask(kWidth * kLanes / 16);  // a panel's 32 lines, evenly
    const int8_t* row = bytes + i * stride;
    int64_t last = rows - 1 - i;
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) {
      in[r] = LoadBytes(row);
      if (r < last) row += stride;
    }
  }

  void WriteLines(Bytes* to) const {
    for (int64_t i = 0; i < rows; i += 4, to += 2 * kVectors) {
      Bytes in[4];
      Load<kVectors>(i, in);
      ReadLines<0, kVectors>(in, to, to + kVectors);
    }
  }
};

// The sums of each digit of a piece with some vectors of a line. One loop over all of them is
// unrolled early: otherwise GCC keeps the sums in memory.
template <int kWidth>
struct Sums {
  static constexpr int kAll = kHalfDigits * kWidth;
  Bytes sum[kAll];

  Sums() {
#pragma GCC unroll 16
    for (int n = 0; n < kAll; ++n) sum[n] = Bytes{};
  }

  void Add(const int8_t (*digits)[4], const Bytes* weights) {
    Bytes spread[kHalfDigits];
#pragma GCC unroll 4
    for (int d = 0; d < kHalfDigits; ++d) {
      int32_t four;
      std::memcpy(&four, digits[d], sizeof(four));
      spread[d] = Spread(four);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kAll; ++n) {
      sum[n] = AddFours(sum[n], weights[n % kWidth], spread[n / kWidth]);
      Pin(sum[n]);
    }
  }

  void Finish(const Piece& piece, Lanes* values) const {
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) {
      Lanes value = {};
#pragma GCC unroll 4
      for (int d = kHalfDigits - 1; d >= 0; --d) {
        Integers own = SumOf(sum[d * kWidth + v]) - piece.totals[d];
        value = value * static_cast<float>(1 << kHalfBits) + __builtin_convertvector(own, Lanes);
      }
      values[v] = value * piece.unit;
    }
  }
};

// values[v] = a piece times vectors v, of kWidth from kFirst on, of the columns of a stripe.
template <int kFirst, int kWidth>
inline void MultiplyBytes(const Piece& piece, const Stripe& stripe, Lanes* values) {
  Sums<kWidth> sums;
  for (int64_t i = 0; i < stripe.rows; i += 4) {
    Bytes in[4], even[kWidth], odd[kWidth];
    stripe.Load<kWidth>(i, in);
    ReadLines<kFirst, kWidth>(in, even, odd);
    sums.Add(piece.digits[i / 2], even);
    sums.Add(piece.digits[i / 2 + 1], odd);
  }
  sums.Finish(piece, values + kFirst);
}

// values[r][v] = a piece of row r, of kCount, times vectors v, of kWidth, of some lines.
template <int kCount, int kWidth>
inline void MultiplyLines(const Piece* x, int64_t x_stride, const Bytes* line, int64_t lines,
                          Lanes (*values)[kVectors]) {
  Sums<kWidth> sums[kCount];
  for (int64_t i = 0; i < lines; ++i, line += kVectors) {
    Bytes weights[kWidth];
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) weights[v] = line[v];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) sums[r].Add(x[r * x_stride].digits[i], weights);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) sums[r].Finish(x[r * x_stride], values[r]);
}

// values[r] = a piece of row r, of kCount, times a stripe: as many vectors at a time as keep their
// sums in registers. Called by pointer: inlined, GCC would keep them in memory.
template <int kCount>
void MultiplyStripe(const Piece* x, int64_t x_stride, const Stripe& stripe,
                    Lanes (*values)[kVectors]) {
  constexpr int kMost = kRegisters * 5 / 8 / kHalfDigits / kCount;
  constexpr int kWidth = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
  if constexpr (kCount == 1) {  // once, so without storing lines
    MultiplyBytes<0, kWidth>(*x, stripe, *values);
    if (kWidth == 2) MultiplyBytes<2, 2>(*x, stripe, *values);
    return;
  }
  for (int v = 0; v < kVectors; v += kWidth) {
    Lanes some[kCount][kVectors];
    MultiplyLines<kCount, kWidth>(x, x_stride, stripe.lines + v, (stripe.rows + 3) / 4 * 2, some);
    for (int r = 0; r < kCount; ++r) std::copy_n(some[r], kWidth, values[r] + v);
  }
}

constexpr int64_t kTogether = kRegisters == 32 ? 4 : 2;  // rows

// y[c] += values[c] * scales[c] for the columns of a stripe.
inline void AddScaled(Lanes* values, const uint16_t* scales, float* y) {
  SortColumns(values);
  for (int64_t v = 0; v < kVectors; ++v, y += kLanes) {
    Store(y, Load(y) + values[v] * Widen(scales + v * kLanes));
  }
}

// Rows of x and columns of a matrix, few enough rows for integers.
struct FewRows {
  const Pieces& x;
  int64_t first_row, rows;
  const Matrix& matrix;
  int64_t first, width;
  const int8_t* then;  // bytes of another such matrix that is multiplied next, or null

  // What follows the inputs before `input`, to be prefetched.
  Ahead Next(int64_t input) const {
    if (input < matrix.inputs) return NextPiece(matrix, input, first, width);
    int64_t rows = then ? std::min(kPiece, matrix.inputs / matrix.groups) / 2 : 0;
    return Ahead(then, matrix.outputs, rows, width);
  }
};

// Adds the products of a piece of each row with the columns of a panel to y.
inline void AddPanelProducts(const FewRows& few, const Piece* piece, const Columns& columns,
                             Ahead* ahead, float* y, int64_t y_stride) {
  constexpr std::array multiply{&MultiplyStripe<1>, &MultiplyStripe<2>, &MultiplyStripe<3>,
                                &MultiplyStripe<4>};
  Bytes lines[kLines * kVectors];
  for (int64_t c = 0; c < columns.count(); c += kStripe) {
    Stripe stripe{columns.bytes() + c, columns.stride(), columns.rows(), lines, ahead};
    if (few.rows > 1) stripe.WriteLines(lines);
    const uint16_t* scales = columns.scales() + c;
    int64_t width = std::min(kStripe, columns.count() - c), each = few.x.each();
    for (int64_t r = 0; r < few.rows; r += kTogether) {
      Lanes values[kTogether][kVectors];
      int64_t count = std::min(kTogether, few.rows - r);
      multiply[count - 1](piece + r * each, each, stripe, values);
      for (int64_t n = 0; n < count; ++n) {
        float *to = y + (r + n) * y_stride + c, own[kStripe];
        if (width == kStripe) {
          AddScaled(values[n], scales, to);
          continue;
        }
        std::copy_n(to, width, own);
        AddScaled(values[n], scales, own);
        std::copy_n(own, width, to);
      }
    }
  }
}

// y[r][...] = row first_row + r of x @ matrix, for some rows and columns.
inline void MultiplyFew(const FewRows& few, float* y, int64_t y_stride) {
  Columns columns;
  int64_t stride = few.matrix.outputs;
  const Piece* piece = few.x.row(few.first_row);
  for (int64_t r = 0; r < few.rows; ++r) std::fill_n(y + r * y_stride, few.width, 0.0f);
  ForPieces(few.matrix, [&](int64_t group, int64_t input, int64_t count) {
    const int8_t* weight = few.matrix.weight + input / 2 * stride + few.first;
    const uint16_t* scales = few.matrix.scales + group * stride + few.first;
    Ahead ahead = few.Next(input + count);
    for (int64_t c = 0; c < few.width; c += kPanel) {
      columns.Take(weight + c, scales + c, stride, count / 2, few.width - c, kStripe < kPanel);
      AddPanelProducts(few, piece, columns, &ahead, y + c, y_stride);
    }
    ++piece;
  });
}

#endif  // KERNELS_NIBBLES

}  // namespace

#endif  // KERNELS_NIBBLES_H_
