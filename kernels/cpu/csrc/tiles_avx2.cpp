// Tiles with AVX2: 16 rows are two vectors of 8; products are summed in 16 bits, widened once a slab.
#include <cstdint>
#include <cstring>

#include "tiles.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "floats.h"

namespace {

struct Avx2 {
    struct I { __m256i a, b; };
    struct F { __m256 a, b; };
    using Part = I;

    static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static inline I none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static inline Part part() { return none(); }
    static inline I load(const uint8_t *at) {
        const __m256i *v = reinterpret_cast<const __m256i *>(at);
        return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
    }
    template <int KIND> static inline I low(I v) {
        const __m256i mask = _mm256_set1_epi8(15);
        return number<KIND>({_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)});
    }
    template <int KIND> static inline I high(I v) {
        const __m256i mask = _mm256_set1_epi8(15);
        return number<KIND>({_mm256_and_si256(_mm256_srli_epi16(v.a, 4), mask),
                             _mm256_and_si256(_mm256_srli_epi16(v.b, 4), mask)});
    }
    // E2M1 codes become 2 x value + 12, numbers from 0 to 24.
    template <int KIND> static inline I number(I v) {
        if (KIND != E2M1) return v;
        const __m256i table = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0, 12, 13, 14,
                                               15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
        return {_mm256_shuffle_epi8(table, v.a), _mm256_shuffle_epi8(table, v.b)};
    }
    static inline void dot(Part &part, I w, const int8_t *x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        const __m256i v = _mm256_set1_epi32(four);
        part.a = _mm256_add_epi16(part.a, _mm256_maddubs_epi16(w.a, v));
        part.b = _mm256_add_epi16(part.b, _mm256_maddubs_epi16(w.b, v));
        // Keeps the compiler from collecting the products of a whole slab before it adds them: there are 16 registers.
        asm("" : "+x"(part.a), "+x"(part.b));
    }
    static inline void add(I &sum, Part part) {
        const __m256i ones = _mm256_set1_epi16(1);
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(part.a, ones));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(part.b, ones));
    }
    static inline F f16(const uint8_t *at) {
        const __m128i *v = reinterpret_cast<const __m128i *>(at);
        return {_mm256_cvtph_ps(_mm_loadu_si128(v)), _mm256_cvtph_ps(_mm_loadu_si128(v + 1))};
    }
    // As a half float with the same bits of exponent and mantissa: 2^-8 of the value.
    static inline F e4m3(const uint8_t *at) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
        const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xBF80)));
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
    }
    static inline F e8m0(const uint8_t *at) { return {power(at), power(at + 8)}; }
    static inline __m256 power(const uint8_t *at) {
        const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at)));
        // 2^-127 is not a normal float.
        const __m256i zero = _mm256_cmpeq_epi32(bits, _mm256_setzero_si256());
        return _mm256_castsi256_ps(
            _mm256_blendv_epi8(_mm256_slli_epi32(bits, 23), _mm256_set1_epi32(1 << 22), zero));
    }
    static inline F nibbles(const uint8_t *at) {
        const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at)));
        return {_mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15))),
                _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 4))};
    }
    static inline F times_less(I sum, const float *by, const float *less) {
        const __m256 x = _mm256_broadcast_ss(by), y = _mm256_broadcast_ss(less);
        return {_mm256_fmsub_ps(_mm256_cvtepi32_ps(sum.a), x, y), _mm256_fmsub_ps(_mm256_cvtepi32_ps(sum.b), x, y)};
    }
    static inline F times_less(I sum, const float *by, F zero, const float *less) {
        const __m256 x = _mm256_broadcast_ss(by), y = _mm256_broadcast_ss(less);
        return {_mm256_fmsub_ps(_mm256_cvtepi32_ps(sum.a), x, _mm256_mul_ps(zero.a, y)),
                _mm256_fmsub_ps(_mm256_cvtepi32_ps(sum.b), x, _mm256_mul_ps(zero.b, y))};
    }
    static inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static inline void store(float *at, F v) {
        _mm256_storeu_ps(at, v.a);
        _mm256_storeu_ps(at + 8, v.b);
    }
};

#include "tiles_body.h"

const Tiles table = {"avx2", round_row, times<Avx2>, silu_times};

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#endif

const Tiles *tiles_avx2() {
    static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return has ? &table : nullptr;
}
#else
const Tiles *tiles_avx2() { return nullptr; }
#endif
