// Tiles with AVX-512 and VNNI: 16 rows are one vector, and products of bytes are summed in 32 bits at once.
// QWENRUN_EMULATED: a header that puts plain code in the place of those instructions, for a test without them.
#include <cstdint>
#include <cstring>

#include "tiles.h"

#if defined(__x86_64__)
#define AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#if defined(QWENRUN_EMULATED)
#pragma GCC target("avx2,fma,f16c")
#include QWENRUN_EMULATED
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target(AVX512))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include <immintrin.h>

#include "floats.h"

namespace {

struct Avx512 {
    using I = __m512i;
    using F = __m512;
    using Part = __m512i;

    static inline F zero() { return _mm512_setzero_ps(); }
    static inline I none() { return _mm512_setzero_si512(); }
    static inline Part part() { return none(); }
    static inline I load(const uint8_t *at) { return _mm512_loadu_si512(at); }
    template <int KIND> static inline I low(I v) { return number<KIND>(_mm512_and_si512(v, _mm512_set1_epi8(15))); }
    template <int KIND> static inline I high(I v) {
        return number<KIND>(_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)));
    }
    template <int KIND> static inline I number(I v) {
        if (KIND != E2M1) return v;
        const __m512i table = _mm512_broadcast_i32x4(
            _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        return _mm512_shuffle_epi8(table, v);
    }
    static inline void dot(Part &part, I w, const int8_t *x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        part = _mm512_dpbusd_epi32(part, w, _mm512_set1_epi32(four));
    }
    static inline void add(I &sum, Part part) { sum = _mm512_add_epi32(sum, part); }
    static inline F f16(const uint8_t *at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
    }
    static inline F e4m3(const uint8_t *at) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
        return _mm512_cvtph_ps(
            _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xBF80))));
    }
    static inline F e8m0(const uint8_t *at) {
        const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
        const __mmask16 zero = _mm512_testn_epi32_mask(bits, bits);
        return _mm512_castsi512_ps(
            _mm512_mask_mov_epi32(_mm512_slli_epi32(bits, 23), zero, _mm512_set1_epi32(1 << 22)));
    }
    static inline F nibbles(const uint8_t *at) {
        const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at)));
        const __m256i first = _mm256_and_si256(v, _mm256_set1_epi32(15)), second = _mm256_srli_epi32(v, 4);
        return _mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
    static inline F times_less(I sum, const float *by, const float *less) {
        return _mm512_fmsub_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(*by), _mm512_set1_ps(*less));
    }
    static inline F times_less(I sum, const float *by, F zero, const float *less) {
        return _mm512_fmsub_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(*by), _mm512_mul_ps(zero, _mm512_set1_ps(*less)));
    }
    static inline F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
    static inline void store(float *at, F v) { _mm512_storeu_ps(at, v); }
};

#include "tiles_body.h"

const Tiles table = {"avx512-vnni", round_row, times<Avx512>, silu_times};

}  // namespace

#if defined(__clang__) && !defined(QWENRUN_EMULATED)
#pragma clang attribute pop
#endif

const Tiles *tiles_avx512() {
#if defined(QWENRUN_EMULATED)
    return &table;
#else
    static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
    return has ? &table : nullptr;
#endif
}
#else
const Tiles *tiles_avx512() { return nullptr; }
#endif
