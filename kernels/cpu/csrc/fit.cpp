// The search for a block's scale: what kernels/ref/fit.py does, in the same order of additions, so with the same bits.
// Eight blocks are one vector; a block's values lie below each other.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif
#include <immintrin.h>

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t MOST = 256; // values of a block
constexpr float F16_MAX = 65504.0f;

using V = __m256;

inline V of(float x) { return _mm256_set1_ps(x); }
inline V choose(V mask, V yes, V no) { return _mm256_blendv_ps(no, yes, mask); }
inline V above(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline V nonzero(V a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_UQ); }
inline V rounded(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The second operand is the result where one is no number: so that x stays what it is.
inline V clamped(V x, V low, V high) { return _mm256_min_ps(high, _mm256_max_ps(low, x)); }
inline V half(V x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(clamped(x, of(-F16_MAX), of(F16_MAX)), 0)); }

// The sum of `terms`, halves added until one is left.
inline V sum(V *terms, int64_t count) {
    while (count > 1) {
        const int64_t part = (count + 1) / 2;
        for (int64_t k = 0; k < count - part; k++) terms[k] = _mm256_add_ps(terms[k], terms[part + k]);
        count = part;
    }
    return terms[0];
}

struct Codes {
    V low, high, zero;
    bool affine;

    V operator()(V x, V divisor) const {
        V code = rounded(_mm256_div_ps(x, divisor));
        if (affine) code = _mm256_add_ps(code, zero);
        return clamped(code, low, high);
    }
};

inline V divisor_of(V step) { return choose(nonzero(step), step, of(__builtin_inff())); }

V error(const V *x, int64_t block, V step, const Codes &codes, V *terms) {
    const V divisor = divisor_of(step);
    for (int64_t k = 0; k < block; k++) {
        V code = codes(x[k], divisor);
        if (codes.affine) code = _mm256_sub_ps(code, codes.zero);
        const V off = _mm256_sub_ps(_mm256_mul_ps(code, step), x[k]);
        terms[k] = _mm256_mul_ps(off, off);
    }
    return sum(terms, block);
}

} // namespace

// blocks [block, n], starts [count, n], plain [n]; zeros [count, n] and plain_zero [n], or null for codes without zero
// points. Out: scales [n] (float16), out_zeros [n] or null, codes [block, n].
extern "C" void qwenrun_cpu_fit(const float *blocks, int64_t block, int64_t n, const float *starts, int64_t count,
                                const float *zeros, const float *plain, const float *plain_zero, float lowest,
                                float highest, uint16_t *scales, float *out_zeros, float *codes) {
    V x[MOST], cross_terms[MOST], square_terms[MOST];
    const bool affine = zeros != nullptr;
    for (int64_t at = 0; at < n; at += LANES) {
        const int64_t lanes = n - at < LANES ? n - at : LANES;
        const auto load = [lanes](const float *from) {
            float room[LANES] = {};
            std::memcpy(room, from, sizeof(float) * lanes);
            return _mm256_loadu_ps(room);
        };
        for (int64_t k = 0; k < block; k++) x[k] = load(blocks + k * n + at);
        V best = of(0), scale = of(0), zero = of(8);
        for (int64_t c = 0; c < count; c++) {
            const V start = load(starts + c * n + at), shift = affine ? load(zeros + c * n + at) : of(0);
            const V inverse = choose(nonzero(start), _mm256_div_ps(of(1), start), of(0));
            const V low = affine ? _mm256_sub_ps(of(0), shift) : of(lowest);
            const V high = affine ? _mm256_sub_ps(of(15), shift) : of(highest);
            for (int64_t k = 0; k < block; k++) {
                const V code = clamped(rounded(_mm256_mul_ps(x[k], inverse)), low, high);
                cross_terms[k] = _mm256_mul_ps(x[k], code);
                square_terms[k] = _mm256_mul_ps(code, code);
            }
            const V cross = sum(cross_terms, block), square = sum(square_terms, block);
            const V gain = choose(above(square, of(0)), _mm256_div_ps(_mm256_mul_ps(cross, cross), square), of(0));
            const V better = above(gain, best);
            best = choose(_mm256_or_ps(better, _mm256_cmp_ps(gain, gain, _CMP_UNORD_Q)), gain, best);
            scale = choose(better, _mm256_div_ps(cross, square), scale);
            zero = choose(better, shift, zero);
        }
        const V simple = load(plain + at), simple_zero = affine ? load(plain_zero + at) : of(0);
        V found = half(scale);
        const Codes first{of(lowest), of(highest), simple_zero, affine}, second{of(lowest), of(highest), zero, affine};
        const V worse = above(error(x, block, found, second, cross_terms), error(x, block, simple, first, square_terms));
        found = choose(worse, simple, found);
        zero = choose(worse, simple_zero, zero);
        const Codes last{of(lowest), of(highest), zero, affine};
        const V divisor = divisor_of(found);
        float room[LANES];
        for (int64_t k = 0; k < block; k++) {
            _mm256_storeu_ps(room, last(x[k], divisor));
            std::memcpy(codes + k * n + at, room, sizeof(float) * lanes);
        }
        uint16_t halves[LANES];
        _mm_storeu_si128(reinterpret_cast<__m128i *>(halves), _mm256_cvtps_ph(found, 0));
        std::memcpy(scales + at, halves, sizeof(uint16_t) * lanes);
        if (affine) {
            _mm256_storeu_ps(room, zero);
            std::memcpy(out_zeros + at, room, sizeof(float) * lanes);
        }
    }
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
extern "C" void qwenrun_cpu_fit(const float *, int64_t, int64_t, const float *, int64_t, const float *, const float *,
                                const float *, float, float, uint16_t *, float *, float *) {}
#endif
