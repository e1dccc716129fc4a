// How a row of float32 becomes integers that processors multiply fast.
//
// As in xla_cpu.matmul, a row is a power of two times integers of 27 bits, each of which is four
// signed digits of seven bits. Products of digits are summed exactly.

#ifndef KERNELS_DIGITS_H_
#define KERNELS_DIGITS_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace {

constexpr int64_t kDigits = 4, kDigitBits = 7;
constexpr int kBits = kDigits * kDigitBits - 2;  // of a magnitude: the highest digit is not full
constexpr int64_t kHalf = 1 << (kDigitBits - 1), kFull = (1 << kDigitBits) - 1;

// A row is `unit` times integers, which are the row times `scale`; unit is NaN if a number is not
// finite.
struct Scaling {
  Scaling(const float* x, int64_t count) {
    int32_t largest = 0;  // the bits of a float, in the order of the floats
    for (int64_t i = 0; i < count; ++i) {
      int32_t bits;
      std::memcpy(&bits, x + i, sizeof(bits));
      largest = std::max(largest, bits & 0x7fffffff);
    }
    // A subnormal float32 unit would become zero.
    int exponent = std::max((largest >> 23) - 126, kBits - 124);
    bool finite = largest < 0x7f800000;
    scale = std::ldexp(1.0f, kBits - exponent);
    unit = finite ? std::ldexp(1.0f, exponent - kBits) : std::numeric_limits<float>::quiet_NaN();
  }

  float scale, unit;
};

// Sorts four vectors, of which v holds columns 4 v ... 4 v + 3 of each 16, by columns.
inline void SortColumns(Lanes* vectors) {
#if defined(__AVX512F__)
  auto* v = reinterpret_cast<__m512*>(vectors);
  __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
  __m512 c = _mm512_shuffle_f32x4(v[0], v[1], 0xee), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
#elif defined(__AVX2__)
  auto* v = reinterpret_cast<__m256*>(vectors);
  __m256 a = v[0], b = v[1], c = v[2], d = v[3];
  v[0] = _mm256_permute2f128_ps(a, b, 0x20);
  v[1] = _mm256_permute2f128_ps(c, d, 0x20);
  v[2] = _mm256_permute2f128_ps(a, b, 0x31);
  v[3] = _mm256_permute2f128_ps(c, d, 0x31);
#endif
}

}  // namespace

#endif  // KERNELS_DIGITS_H_
