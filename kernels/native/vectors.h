// Eight floats at a time, of float or bf16 in memory, with the vector types of GCC and Clang. `T` is the dtype.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#include <omp.h>

namespace {

constexpr int LANES = 8;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

struct bf16 { uint16_t bits; };

inline vec load(const float* p) { vec x; std::memcpy(&x, p, sizeof x); return x; }
inline vec load(const bf16* p) {
  hvec h; std::memcpy(&h, p, sizeof h);
  uvec u = __builtin_convertvector(h, uvec) << 16;
  vec x; std::memcpy(&x, &u, sizeof x); return x;
}
inline float scalar(const float* p) { return *p; }
inline float scalar(const bf16* p) { uint32_t u = uint32_t(p->bits) << 16; float x; std::memcpy(&x, &u, 4); return x; }
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
  uint32_t u; std::memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // to the nearest, ties to even
}
inline float sum(vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// exp for x <= 0 (Cephes' polynomial); exactly 0 where float has no normal number left.
inline vec exp_negative(vec x) {
  vec low = vec{} - 87.0f, kept = x > low ? x : low;
  ivec n = __builtin_convertvector(kept * 1.44269504f - 0.5f, ivec);
  vec whole = __builtin_convertvector(n, vec);
  vec r = kept - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
  ivec power = (n + 127) << 23;
  vec scale; std::memcpy(&scale, &power, sizeof scale);
  return x > low ? p * scale : x != x ? x : vec{};
}

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

inline vec pairs(vec a, vec b) { return PICK(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + PICK(a, b, 1, 3, 9, 11, 5, 7, 13, 15); }

// The sums of eight vectors' lanes, as one vector.
inline vec sums(const vec* x) {
  const vec a = pairs(pairs(x[0], x[1]), pairs(x[2], x[3])), b = pairs(pairs(x[4], x[5]), pairs(x[6], x[7]));
  return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

}  // namespace
