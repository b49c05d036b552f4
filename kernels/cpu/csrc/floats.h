// Float arithmetic that compilers turn into vectors: exp, silu, dot products. Branch-free, no library calls.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));

static inline v8 load8(const float *at) {
    v8 v;
    std::memcpy(&v, at, sizeof v);
    return v;
}
static inline void store8(float *at, v8 v) { std::memcpy(at, &v, sizeof v); }
static inline v8 all8(float x) { return v8{x, x, x, x, x, x, x, x}; }
// a b + c, rounded once where the processor can.
static inline v8 fma8(v8 a, v8 b, v8 c) {
#if defined(__FMA__)
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
static inline float sum8(v8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// e^x to 2 units in the last place: x = n ln 2 + r, a polynomial in r (Cephes' expf), 2^n put into the exponent.
// Results below 2^-126 are 0. Not a number stays not a number.
static inline float exp_float(float x) {
    const float most = 88.3762626647949f, least = -87.3365447504019f;
    float v = x > most ? most : x;
    v = v < least ? least : v;
    const float n = __builtin_floorf(v * 1.44269504088896341f + 0.5f);
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    // Not a number has no integer: it is left out of the conversion, and kept by p.
    const int32_t bits = (static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23;
    float two;
    std::memcpy(&two, &bits, 4);
    const float out = p * two;
    return x < least ? 0.0f : x > most ? __builtin_inff() : out;
}

static inline float silu(float x) { return x / (1.0f + exp_float(-x)); }

static inline float dot(const float *a, const float *b, int64_t count) {
    v8 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        s0 = fma8(load8(a + i), load8(b + i), s0);
        s1 = fma8(load8(a + i + 8), load8(b + i + 8), s1);
        s2 = fma8(load8(a + i + 16), load8(b + i + 16), s2);
        s3 = fma8(load8(a + i + 24), load8(b + i + 24), s3);
    }
    float sum = sum8((s0 + s1) + (s2 + s3));
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}
