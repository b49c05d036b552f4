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
// The largest of 8; one that is not a number may be passed over.
static inline float max8(v8 v) {
#if defined(__AVX__)
    __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#else
    float most = v[0];
    for (int i = 1; i < 8; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// `yes` where the lane of `mask` is all ones, else `no`.
static inline v8 pick8(i8 mask, v8 yes, v8 no) { return (v8)((mask & (i8)yes) | (~mask & (i8)no)); }

// e^x to 2 units in the last place: x = n ln 2 + r, a polynomial in r (Cephes' expf), 2^n put into the exponent.
// Results below 2^-126 are 0. Not a number stays not a number.
static inline v8 exp8(v8 x) {
    const v8 most = all8(88.3762626647949f), least = all8(-87.3365447504019f);
    v8 v = pick8(x > most, most, x);
    v = pick8(v < least, least, v);
    // Adding and taking off 1.5 x 2^23 rounds to an integer, whose bits are then the low ones.
    const v8 magic = all8(12582912.0f), shifted = fma8(v, all8(1.44269504088896341f), magic), n = shifted - magic;
    const v8 r = fma8(n, all8(2.12194440e-4f), fma8(n, all8(-0.693359375f), v));
    v8 p = all8(1.9875691500e-4f);
    p = fma8(p, r, all8(1.3981999507e-3f));
    p = fma8(p, r, all8(8.3334519073e-3f));
    p = fma8(p, r, all8(4.1665795894e-2f));
    p = fma8(p, r, all8(1.6666665459e-1f));
    p = fma8(p, r, all8(5.0000001201e-1f));
    p = fma8(p, r * r, r + all8(1.0f));
    const v8 out = p * (v8)(((i8)shifted - (i8)magic + 127) << 23);
    return pick8(x < least, v8{}, pick8(x > most, all8(__builtin_inff()), out));
}
static inline v8 silu8(v8 x) { return x / (all8(1.0f) + exp8(-x)); }

static inline float exp_float(float x) { return exp8(all8(x))[0]; }

// The first `lanes` of 8, the others 0.
static inline v8 load_some(const float *at, int64_t lanes) {
    if (lanes == 8) return load8(at);
    v8 v = {};
    std::memcpy(&v, at, lanes * sizeof(float));
    return v;
}
static inline void store_some(float *at, v8 v, int64_t lanes) {
    if (lanes == 8) return store8(at, v);
    std::memcpy(at, &v, lanes * sizeof(float));
}
// body(i, lanes) for i = 0, 8, .. of `count`; lanes < 8 only in the last.
template <typename F> static inline void by_eights(int64_t count, F &&body) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) body(i, int64_t{8});
    if (i < count) body(i, count - i);
}

// to[c * to_step + r] = from[r * from_step + c] for 8 x 8 numbers.
static inline void transpose8(const float *from, int64_t from_step, float *to, int64_t to_step) {
#if defined(__AVX__)
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_step);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * to_step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#else
    for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) to[c * to_step + r] = from[r * from_step + c];
#endif
}

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
