// Vectors of the processor's width (compilers generate slow code for wider ones), and what the
// products on a CPU share.

#ifndef KERNELS_LANES_H_
#define KERNELS_LANES_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kRegisters = 32;
#else
constexpr int64_t kRegisters = 16;
#endif

constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kPanel = 64;   // columns that are processed together: a line of int8
constexpr int64_t kTile = 6;     // rows that are multiplied at a time, with their sums in registers
constexpr int64_t kRows = 64;    // most rows for which each weight is read once
constexpr int64_t kTokens = 4;   // rows of x per tile of digits

// The number of vectors of a panel that `count` rows are multiplied with at a time: as many as fit
// the registers together with their sums and a number of x.
constexpr int64_t VectorsOf(int64_t count) {
  int64_t vectors = kPanel / kLanes;
  while (count > 1 && vectors * (count + 1) >= kRegisters) vectors /= 2;
  return vectors;
}

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Anywhere
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

inline Lanes Load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }

inline void Store(float* to, Lanes lanes) { *reinterpret_cast<Anywhere*>(to) = lanes; }

// Keeps a value in a register, already rounded: GCC would reload it from memory each time, or fuse
// a product with the addition that follows.
template <typename Value>
inline void Pin(Value& value) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#elif defined(__x86_64__)
  __asm__("" : "+x"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#else
  __asm__("" : "+m"(value));
#endif
}

inline float Sum(Lanes lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(lanes));
#elif defined(__AVX2__)
  __m256 eight = reinterpret_cast<__m256>(lanes);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Lanes>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  float wide[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) wide[lane] = from[lane];
  return Load(wide);
#endif
}

// Widens the lower four bits of each byte, and the higher ones.
inline void WidenHalves(const int8_t* from, Lanes* low, Lanes* high) {
#if defined(__AVX512F__)
  __m512i bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  __m512i shifted = _mm512_srai_epi32(_mm512_slli_epi32(bytes, 28), 28);
  *low = reinterpret_cast<Lanes>(_mm512_cvtepi32_ps(shifted));
  *high = reinterpret_cast<Lanes>(_mm512_cvtepi32_ps(_mm512_srai_epi32(bytes, 4)));
#elif defined(__AVX2__)
  __m256i bytes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  __m256i shifted = _mm256_srai_epi32(_mm256_slli_epi32(bytes, 28), 28);
  *low = reinterpret_cast<Lanes>(_mm256_cvtepi32_ps(shifted));
  *high = reinterpret_cast<Lanes>(_mm256_cvtepi32_ps(_mm256_srai_epi32(bytes, 4)));
#else
  float wide[2][kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    wide[0][lane] = static_cast<int8_t>(from[lane] * 16) / 16;
    wide[1][lane] = from[lane] >> 4;
  }
  *low = Load(wide[0]);
  *high = Load(wide[1]);
#endif
}

inline Lanes Widen(const int16_t* from) {
#if defined(__AVX512F__)
  __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Lanes>(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(halves)));
#elif defined(__AVX2__)
  __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Lanes>(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(halves)));
#else
  float wide[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) wide[lane] = from[lane];
  return Load(wide);
#endif
}

// Sorts four vectors, of which v holds columns 4 v ... 4 v + 3 of each 16, by columns. With AVX2 or
// AVX-512 only.
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

inline float FromBfloat16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Rounds a number to bfloat16, ties to even.
inline float ToBfloat16(float value) {
  if (value != value) return value;  // rounding could make a NaN infinite
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits += 0x7fff + ((bits >> 16) & 1);
  return FromBfloat16(static_cast<uint16_t>(bits >> 16));
}

inline float ToFloat(float value) { return value; }
inline float ToFloat(int16_t value) { return value; }
inline float ToFloat(uint16_t bits) { return FromBfloat16(bits); }

inline Lanes Widen(const float* from) { return Load(from); }

inline Lanes Widen(const uint16_t* from) {  // bfloat16
#if defined(__AVX512F__)
  __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Lanes>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
  __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Lanes>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
  float wide[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) wide[lane] = FromBfloat16(from[lane]);
  return Load(wide);
#endif
}

typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

// exp(x) - less, for |x| <= 80. With x = n ln 2 + r it is 2^n (exp(r) - 1) + (2^n - less), exact to
// a few units in the last place, also near zero if less is one; |r| <= 0.35, for which eight terms
// of exp's series suffice.
inline Lanes Exp(Lanes x, float less) {
  constexpr float kRound = 3 << 22;  // adding and subtracting it rounds to the nearest integer
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

// Scratch memory of a thread, which grows and is reused.
class Memory {
 public:
  Memory() = default;
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Returns at least `bytes` bytes, aligned to a line; the previous contents are lost.
  void* AtLeast(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + kLine - 1) / kLine * kLine;
      data_ = std::aligned_alloc(kLine, size_);
      if (!data_) size_ = 0, throw std::bad_alloc();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Matrix {
  const int8_t* weight;    // [inputs / in_byte, outputs]
  const uint16_t* scales;  // bfloat16 [groups, outputs]
  int64_t inputs, outputs, groups;
  int64_t in_byte;  // inputs in a byte: 1, or 2 of four bits each
};

// Prefetches the next block of a matrix line by line, in memory order, while another is multiplied.
class Ahead {
 public:
  Ahead(const int8_t* block, int64_t stride, int64_t rows, int64_t width)
      : row_(block), stride_(stride), rows_(rows), width_(width) {}

  // Prefetches the next `lines` lines.
  void Ask(int64_t lines) {
    while (rows_ > 0 && lines > 0) {
      int64_t end = std::min(column_ + lines * kLine, width_);
      for (; column_ < end; column_ += kLine, --lines) __builtin_prefetch(row_ + column_, 0, 2);
      if (column_ < width_) return;
      column_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const int8_t* row_;
  int64_t stride_, rows_, width_, column_ = 0;
};

}  // namespace

#endif  // KERNELS_LANES_H_
