// Products with encoded matrices on a CPU: int4, int8 and e2m1 codes against activations rounded to int8 block by
// block, bf16 against float32. The weights are read once, as a pack stores them; sums of a block are integers, and
// one fused multiply-add a block applies the two scales. A row of activations gives the same bits whatever other
// rows are in the call. Knows no file, no Python object and no torch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"
#include "tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace {

bool has_avx2() {
#if defined(__x86_64__)
    static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                            __builtin_cpu_supports("f16c");
    return has;
#else
    return false;
#endif
}

// Rows of activations as the kernels read them. For quantized weights: codes int8 [rows, cols], in every run of 64
// values the even ones before the odd ones (as nibbles lie in bytes); scales float [rows, step], with room for whole
// vectors; and what a block's integer sum is too large by: the sum of its codes, times 8 for int4 and 12 for e2m1,
// times 1 where the weights have zero points. For bf16 weights only the float rows.
struct Acts {
    const float *values = nullptr;
    int64_t cols = 0, blocks = 0;
    bool fast = false;
    std::unique_ptr<int8_t[]> codes;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<int32_t[]> sums;
    int64_t step() const { return (blocks + 7) / 8 * 8; }
    const int8_t *q(int64_t row) const { return codes.get() + row * cols; }
    const float *s(int64_t row) const { return scales.get() + row * step(); }
    const int32_t *i(int64_t row) const { return sums.get() + row * step(); }
    const float *x(int64_t row) const { return values + row * cols; }
};

int32_t too_large(const Matrix &w) { return w.kind == INT4 ? (w.zeros ? 1 : 8) : w.kind == E2M1 ? 12 : 0; }

int64_t run_length(const Matrix &w) { return w.cols % 64 == 0 ? 64 : 2; }

void quantize_row(const Matrix &w, const float *x, int8_t *q, float *scales, int32_t *sums) {
    const int64_t block = w.block, run = w.kind == INT8 ? 1 : run_length(w);
    for (int64_t b = 0; b < w.cols / block; ++b) {
        const float *v = x + b * block;
        float most = 0.0f;
        for (int64_t i = 0; i < block; ++i) most = std::max(most, std::fabs(v[i]));
        // Not a number stays not a number: a maximum would hide it.
        float probe = 0.0f;
        for (int64_t i = 0; i < block; ++i) probe += v[i] * 0.0f;
        const float scale = most / 127.0f + probe, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        int32_t sum = 0;
        for (int64_t i = 0; i < block; ++i) {
            const float code = std::nearbyint(std::isfinite(inverse) ? v[i] * inverse : 0.0f);
            const int8_t c = code >= -127.0f && code <= 127.0f ? static_cast<int8_t>(code) : 0;
            sum += c;
            const int64_t at = b * block + i;
            if (run == 1) {
                q[at] = c;
            } else {
                const int64_t base = at / run * run, in = at - base;
                q[base + (in & 1) * (run / 2) + in / 2] = c;
            }
        }
        scales[b] = scale;
        sums[b] = sum * too_large(w);
    }
}

#if defined(__x86_64__)
// The same, for blocks that are whole vectors; rounding is to even in both.
AVX2 void quantize_row_avx2(const Matrix &w, const float *x, int8_t *q, float *scales, int32_t *sums) {
    const int64_t block = w.block;
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    alignas(32) int8_t plain[64];
    for (int64_t start = 0; start < w.cols; start += 64) {
        for (int64_t part = 0; part < 64; part += std::min<int64_t>(block, 64)) {
            const int64_t at = start + part, b = at / block;
            if (at % block == 0) {
                __m256 most = _mm256_setzero_ps(), probe = _mm256_setzero_ps();
                for (int64_t i = 0; i < block; i += 8) {
                    const __m256 v = _mm256_loadu_ps(x + at + i);
                    most = _mm256_max_ps(most, _mm256_and_ps(v, magnitude));
                    probe = _mm256_add_ps(probe, _mm256_mul_ps(v, _mm256_setzero_ps()));
                }
                alignas(32) float m[8], p[8];
                _mm256_store_ps(m, most);
                _mm256_store_ps(p, probe);
                float largest = 0.0f, odd = 0.0f;
                for (int i = 0; i < 8; ++i) largest = std::max(largest, m[i]), odd += p[i];
                scales[b] = largest / 127.0f + odd;
                sums[b] = 0;
            }
            const float inverse = scales[b] > 0.0f && std::isfinite(1.0f / scales[b]) ? 1.0f / scales[b] : 0.0f;
            const __m256 by = _mm256_set1_ps(inverse);
            __m256i sum = _mm256_setzero_si256();
            for (int64_t i = 0; i < std::min<int64_t>(block, 64); i += 8) {
                __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + at + i), by);
                // What is not a number has no code; the block's scale says that it is there.
                v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
                const __m256i c = _mm256_cvtps_epi32(v);
                sum = _mm256_add_epi32(sum, c);
                const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
                _mm_storel_epi64(reinterpret_cast<__m128i *>(plain + part + i), _mm_packs_epi16(half, half));
            }
            alignas(32) int32_t lanes[8];
            _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), sum);
            int32_t total = 0;
            for (int lane : lanes) total += lane;
            sums[b] += total * too_large(w);
        }
        if (w.kind == INT8) {
            std::memcpy(q + start, plain, 64);
        } else {
            const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8,
                                                   10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            // Even values of 16 in the low half of each lane; then the halves are put side by side.
            __m256i a = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<__m256i *>(plain)), order);
            __m256i b = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<__m256i *>(plain + 32)), order);
            a = _mm256_permute4x64_epi64(a, 0xD8);
            b = _mm256_permute4x64_epi64(b, 0xD8);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(q + start), _mm256_permute2x128_si256(a, b, 0x20));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(q + start + 32), _mm256_permute2x128_si256(a, b, 0x31));
        }
    }
}
#endif

bool whole_vectors(const Matrix &w) {
    if (w.kind == BF16) return w.cols % 16 == 0;
    if (w.cols % 64) return false;
    if (w.kind == E2M1) return w.block == 16;
    return w.block == 32 || w.block % 64 == 0;
}

bool fast(const Matrix &w) { return has_avx2() && whole_vectors(w); }

Acts prepare(const Matrix &w, const float *x, int64_t rows) {
    Acts acts;
    acts.values = x;
    acts.cols = w.cols;
    acts.fast = fast(w);
    if (w.kind == BF16) return acts;
    acts.blocks = w.cols / w.block;
    acts.codes.reset(new int8_t[rows * w.cols]);
    acts.scales.reset(new float[rows * acts.step()]);
    acts.sums.reset(new int32_t[rows * acts.step()]);
    auto one = [&](int64_t row) {
        int8_t *q = acts.codes.get() + row * w.cols;
        float *s = acts.scales.get() + row * acts.step();
        int32_t *m = acts.sums.get() + row * acts.step();
#if defined(__x86_64__)
        if (acts.fast) return quantize_row_avx2(w, x + row * w.cols, q, s, m);
#endif
        quantize_row(w, x + row * w.cols, q, s, m);
    };
    if (rows < 4) {
        for (int64_t row = 0; row < rows; ++row) one(row);
    } else {
        Pool::get().each(rows, one);
    }
    return acts;
}

float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3FFu;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
    const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

float e4m3_to_float(uint8_t e) {
    if ((e & 127) == 127) return NAN;
    const int exponent = (e >> 3) & 15, mantissa = e & 7;
    const float value = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(1.0f * mantissa, -9);
    return e & 128 ? -value : value;
}

constexpr int8_t DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

float scale_at(const Matrix &w, int64_t r, int64_t blocks, int64_t b) {
    if (w.scale == E4M3) return e4m3_to_float(w.scales[r * blocks + b]);
    uint16_t half;
    std::memcpy(&half, w.scales + 2 * (r * blocks + b), 2);
    return half_to_float(half);
}

#if defined(__x86_64__)
AVX2 inline float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

AVX2 inline __m256i load(const void *at) { return _mm256_loadu_si256(static_cast<const __m256i *>(at)); }

// Eight scales as floats. What is beyond the row's end may be read only if it is part of the matrix.
AVX2 inline __m256 eight_scales(const Matrix &w, const uint8_t *at) {
    if (w.scale == F16) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
    // The bits of an E4M3 number, moved to a float's exponent and mantissa, are 2^-120 of it.
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at)));
    const __m256i low = _mm256_and_si256(wide, _mm256_set1_epi32(127));
    const __m256 size = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(low, 20)), _mm256_set1_ps(0x1p120f));
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(wide, 7), 31);
    const __m256i nan = _mm256_cmpeq_epi32(low, _mm256_set1_epi32(127));
    return _mm256_or_ps(size, _mm256_castsi256_ps(_mm256_or_si256(sign, nan)));
}

// scale of the weights x scale of the activations, for every block of a row and N rows of activations.
template <int N>
AVX2 inline void joint_scales(const Matrix &w, const uint8_t *scales, const Acts &acts, const int64_t *rows, float *out,
                              int64_t step) {
    const int64_t blocks = acts.blocks, width = w.scale == F16 ? 2 : 1;
    for (int64_t b = 0; b < blocks; b += 8) {
        __m256 s;
        if (b + 8 <= blocks) {
            s = eight_scales(w, scales + b * width);
        } else {
            uint8_t rest[16] = {};
            std::memcpy(rest, scales + b * width, (blocks - b) * width);
            s = eight_scales(w, rest);
        }
        for (int n = 0; n < N; ++n)
            _mm256_storeu_ps(out + n * step + b, _mm256_mul_ps(s, _mm256_loadu_ps(acts.s(rows[n]) + b)));
    }
}

// One row of 4-bit codes times N rows of activations; a block's codes are too large by 8 (int4), by its zero point,
// or by 12 (e2m1, doubled), which is taken off its integer sum.
template <int N>
AVX2 void nibbles_avx2(const Matrix &w, const uint8_t *codes, const uint8_t *zeros, const Acts &acts,
                       const int64_t *rows, const float *joint, int64_t step, float *out) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const __m256i values = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0, 12, 13, 14, 15,
                                            16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    const __m256i pairs = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const int64_t block = w.block, chunks = w.cols / 64;
    __m256 acc[N];
    const int8_t *q[N];
    const int32_t *less[N];
    for (int n = 0; n < N; ++n) {
        acc[n] = _mm256_setzero_ps();
        q[n] = acts.q(rows[n]);
        less[n] = acts.i(rows[n]);
    }
    if (block == 16) {
        for (int64_t c = 0; c < chunks; ++c) {
            const __m256i v = load(codes + 32 * c);
            const __m256i lo = _mm256_shuffle_epi8(values, _mm256_and_si256(v, low));
            const __m256i hi = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
            for (int n = 0; n < N; ++n) {
                const __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(lo, load(q[n] + 64 * c)),
                                                   _mm256_maddubs_epi16(hi, load(q[n] + 64 * c + 32)));
                // Four sums of activations, each in the first lane of its block's two.
                const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i *>(less[n] + 4 * c));
                const __m256i sum = _mm256_sub_epi32(_mm256_madd_epi16(p, ones), _mm256_cvtepu32_epi64(four));
                const __m256 by = _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(joint + n * step + 4 * c));
                acc[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_permutevar8x32_ps(by, pairs), acc[n]);
            }
        }
    } else if (block == 32) {
        for (int64_t c = 0; c < chunks; ++c) {
            const __m256i v = load(codes + 32 * c);
            const __m256i lo = _mm256_and_si256(v, low), hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
            const int32_t z0 = zeros ? zeros[c] & 15 : 1, z1 = zeros ? zeros[c] >> 4 : 1;
            for (int n = 0; n < N; ++n) {
                const __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(lo, load(q[n] + 64 * c)),
                                                   _mm256_maddubs_epi16(hi, load(q[n] + 64 * c + 32)));
                const __m256i two = _mm256_set_m128i(_mm_cvtsi32_si128(less[n][2 * c + 1] * z1),
                                                     _mm_cvtsi32_si128(less[n][2 * c] * z0));
                const float *by = joint + n * step + 2 * c;
                const __m256 both = _mm256_set_m128(_mm_broadcast_ss(by + 1), _mm_broadcast_ss(by));
                const __m256i sum = _mm256_sub_epi32(_mm256_madd_epi16(p, ones), two);
                acc[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, acc[n]);
            }
        }
    } else {
        const int64_t blocks = w.cols / block;
        for (int64_t b = 0; b < blocks; ++b) {
            const int32_t z = zeros ? (zeros[b / 2] >> (b % 2 * 4)) & 15 : 1;
            __m256i sum[N];
            for (int n = 0; n < N; ++n) sum[n] = _mm256_castsi128_si256(_mm_setzero_si128());
            int64_t at = b * block;
            const int64_t end = at + block;
            // Two runs of 64 fit into sums of 16 bits: 8 products of at most 15 x 127 a lane.
            for (; at + 128 <= end; at += 128) {
                const __m256i v = load(codes + at / 2), u = load(codes + at / 2 + 32);
                const __m256i v0 = _mm256_and_si256(v, low), v1 = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
                const __m256i u0 = _mm256_and_si256(u, low), u1 = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
                for (int n = 0; n < N; ++n) {
                    const __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(v0, load(q[n] + at)),
                                                       _mm256_maddubs_epi16(v1, load(q[n] + at + 32)));
                    const __m256i r = _mm256_add_epi16(_mm256_maddubs_epi16(u0, load(q[n] + at + 64)),
                                                       _mm256_maddubs_epi16(u1, load(q[n] + at + 96)));
                    sum[n] = _mm256_add_epi32(sum[n], _mm256_madd_epi16(_mm256_add_epi16(p, r), ones));
                }
            }
            for (; at < end; at += 64) {
                const __m256i v = load(codes + at / 2);
                const __m256i v0 = _mm256_and_si256(v, low), v1 = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
                for (int n = 0; n < N; ++n) {
                    const __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(v0, load(q[n] + at)),
                                                       _mm256_maddubs_epi16(v1, load(q[n] + at + 32)));
                    sum[n] = _mm256_add_epi32(sum[n], _mm256_madd_epi16(p, ones));
                }
            }
            for (int n = 0; n < N; ++n) {
                const __m256i off = _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_cvtsi32_si128(less[n][b] * z), 0);
                acc[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum[n], off)),
                                         _mm256_broadcast_ss(joint + n * step + b), acc[n]);
            }
        }
    }
    for (int n = 0; n < N; ++n) out[n] = w.kind == E2M1 ? 0.5f * sum8(acc[n]) : sum8(acc[n]);
}

template <int N>
AVX2 void bytes_avx2(const Matrix &w, const uint8_t *codes, const Acts &acts, const int64_t *rows, const float *joint,
                     int64_t step, float *out) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[N];
    for (int n = 0; n < N; ++n) acc[n] = _mm256_setzero_ps();
    for (int64_t b = 0; b < w.cols / w.block; ++b) {
        __m256i sum[N];
        for (int n = 0; n < N; ++n) sum[n] = _mm256_setzero_si256();
        for (int64_t at = b * w.block; at < (b + 1) * w.block; at += 32) {
            const __m256i v = load(codes + at), size = _mm256_abs_epi8(v);
            for (int n = 0; n < N; ++n) {
                const __m256i x = _mm256_sign_epi8(load(acts.q(rows[n]) + at), v);
                sum[n] = _mm256_add_epi32(sum[n], _mm256_madd_epi16(_mm256_maddubs_epi16(size, x), ones));
            }
        }
        for (int n = 0; n < N; ++n)
            acc[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[n]), _mm256_broadcast_ss(joint + n * step + b), acc[n]);
    }
    for (int n = 0; n < N; ++n) out[n] = sum8(acc[n]);
}

template <int N>
AVX2 void bf16_avx2(const Matrix &w, const uint8_t *codes, const Acts &acts, const int64_t *rows, float *out) {
    __m256 a[N], b[N];
    for (int n = 0; n < N; ++n) a[n] = b[n] = _mm256_setzero_ps();
    const uint16_t *v = reinterpret_cast<const uint16_t *>(codes);
    for (int64_t i = 0; i < w.cols; i += 16) {
        const __m128i *at = reinterpret_cast<const __m128i *>(v + i);
        const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16));
        const __m256 y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1)), 16));
        for (int n = 0; n < N; ++n) {
            a[n] = _mm256_fmadd_ps(x, _mm256_loadu_ps(acts.x(rows[n]) + i), a[n]);
            b[n] = _mm256_fmadd_ps(y, _mm256_loadu_ps(acts.x(rows[n]) + i + 8), b[n]);
        }
    }
    for (int n = 0; n < N; ++n) out[n] = sum8(_mm256_add_ps(a[n], b[n]));
}

// Row `r` of w times N rows of activations.
template <int N>
AVX2 inline void row_avx2(const Matrix &w, int64_t r, const Acts &acts, const int64_t *rows, float *joint, float *out) {
    if (w.kind == BF16) return bf16_avx2<N>(w, w.codes + r * 2 * w.cols, acts, rows, out);
    const int64_t blocks = acts.blocks, step = acts.step();
    joint_scales<N>(w, w.scales + r * blocks * (w.scale == F16 ? 2 : 1), acts, rows, joint, step);
    const uint8_t *zeros = w.zeros ? w.zeros + r * ((blocks + 1) / 2) : nullptr;
    if (w.kind == INT8) bytes_avx2<N>(w, w.codes + r * w.cols, acts, rows, joint, step, out);
    else nibbles_avx2<N>(w, w.codes + r * w.cols / 2, zeros, acts, rows, joint, step, out);
}

// Rows first..last of w times `count` rows of activations: out[(r - first) * stride + n].
AVX2 void block_avx2(const Matrix &w, int64_t first, int64_t last, const Acts &acts, const int64_t *rows,
                     int64_t count, float *joint, float *out, int64_t stride) {
    for (int64_t r = first; r < last; ++r, out += stride) {
        int64_t n = 0;
        for (; n + 4 <= count; n += 4) row_avx2<4>(w, r, acts, rows + n, joint, out + n);
        for (; n < count; ++n) row_avx2<1>(w, r, acts, rows + n, joint, out + n);
    }
}
#endif

// Any shape, any processor: the same integers, summed one by one.
float row_plain(const Matrix &w, int64_t r, const Acts &acts, int64_t row) {
    if (w.kind == BF16) {
        double sum = 0.0;
        for (int64_t i = 0; i < w.cols; ++i) {
            uint16_t half;
            std::memcpy(&half, w.codes + 2 * (r * w.cols + i), 2);
            const uint32_t bits = static_cast<uint32_t>(half) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            sum += static_cast<double>(value) * acts.x(row)[i];
        }
        return static_cast<float>(sum);
    }
    const int8_t *q = acts.q(row);
    const int64_t run = w.kind == INT8 ? 1 : run_length(w), blocks = acts.blocks;
    const uint8_t *codes = w.codes + r * (w.kind == INT8 ? w.cols : w.cols / 2);
    const uint8_t *zeros = w.zeros ? w.zeros + r * ((blocks + 1) / 2) : nullptr;
    float out = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) {
        int32_t sum = 0;
        for (int64_t at = b * w.block; at < (b + 1) * w.block; ++at) {
            int32_t code;
            if (w.kind == INT8) {
                code = static_cast<int8_t>(codes[at]);
            } else {
                const int nibble = (codes[at / 2] >> (at % 2 * 4)) & 15;
                code = w.kind == E2M1 ? DOUBLED[nibble] + 12 : nibble;
            }
            const int64_t base = at / run * run, in = at - base;
            sum += code * q[run == 1 ? at : base + (in & 1) * (run / 2) + in / 2];
        }
        if (w.kind != INT8) sum -= acts.i(row)[b] * (zeros ? (zeros[b / 2] >> (b % 2 * 4)) & 15 : 1);
        out += scale_at(w, r, blocks, b) * acts.s(row)[b] * static_cast<float>(sum);
    }
    return w.kind == E2M1 ? 0.5f * out : out;
}

// Rows first..last of w times the activation rows `rows[0..count)`: out[(r - first) * stride + n].
void block_times(const Matrix &w, int64_t first, int64_t last, const Acts &acts, const int64_t *rows, int64_t count,
                 float *out, int64_t stride) {
#if defined(__x86_64__)
    if (acts.fast) {
        thread_local std::vector<float> joint;
        if (static_cast<int64_t>(joint.size()) < 4 * acts.step()) joint.resize(4 * acts.step());
        block_avx2(w, first, last, acts, rows, count, joint.data(), out, stride);
    } else
#endif
        for (int64_t r = first; r < last; ++r)
            for (int64_t n = 0; n < count; ++n) out[(r - first) * stride + n] = row_plain(w, r, acts, rows[n]);
    if (w.tensor_scale)
        for (int64_t r = first; r < last; ++r) {
            const float by = w.tensor_scale[r * w.tensor_scales / w.rows];
            for (int64_t n = 0; n < count; ++n) out[(r - first) * stride + n] *= by;
        }
}

// A matrix out of a stack.
Matrix nth(const Matrix &stack, int64_t index) {
    Matrix w = stack;
    w.codes += index * stack.codes_step;
    if (w.scales) w.scales += index * stack.scales_step;
    if (w.zeros) w.zeros += index * stack.zeros_step;
    if (w.tensor_scale)
        w.tensor_scale = reinterpret_cast<const float *>(reinterpret_cast<const uint8_t *>(w.tensor_scale) +
                                                         index * stack.tensor_step);
    return w;
}

// Activation rows that are multiplied at a time: few enough to stay in the second cache.
constexpr int64_t TOKENS = 32;

int64_t rows_per_task(int64_t rows, int64_t jobs) {
    const int64_t wanted = rows * jobs / (Pool::get().threads() * 6);
    return std::min<int64_t>(std::max<int64_t>(wanted, 8), 256);
}

// A piece of work: rows first..last of matrix `group`.
struct Piece {
    int64_t group, first, last;
};

std::vector<Piece> cut(int64_t rows, int64_t groups) {
    const int64_t step = rows_per_task(rows, groups);
    std::vector<Piece> out;
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t r = 0; r < rows; r += step) out.push_back({g, r, std::min(rows, r + step)});
    return out;
}


// -- tiled matrices ------------------------------------------------------------------------------------------

const Tiles *tiles() {
    static const Tiles *best = [] {
        const char *limit = std::getenv("QWENRUN_CPU");
        const bool plain = limit && std::strcmp(limit, "avx2") == 0;
        return !plain && tiles_avx512() ? tiles_avx512() : tiles_avx2();
    }();
    return best;
}

// x float [rows, cols], rounded for w into codes int8 [rows, cols] and scales float [2, rows, blocks].
Rounded round_into(const Matrix &w, const float *x, int64_t rows, int8_t *codes, float *scales) {
    const int64_t blocks = w.cols / w.block;
    float *less = scales + rows * blocks;
    auto one = [&](int64_t r) {
        tiles()->round(w, x + r * w.cols, codes + r * w.cols, scales + r * blocks, less + r * blocks);
    };
    if (rows < 4) {
        for (int64_t r = 0; r < rows; ++r) one(r);
    } else {
        Pool::get().each(rows, one);
    }
    return {codes, scales, less, w.cols, blocks};
}

// The same, into scratch memory: what a call was given, or what it made between two matrices.
Rounded round_for(const Matrix &w, const float *x, int64_t rows, bool inner = false) {
    int8_t *codes = scratch<int8_t>(inner ? INNER_CODES : CODES, rows * w.cols);
    return round_into(w, x, rows, codes, scratch<float>(inner ? INNER_SCALES : SCALES, 2 * rows * (w.cols / w.block)));
}

// out[n * stride + i] *= the tensor scale of row 16 * first + i.
void scale_tiles(const Matrix &w, int64_t first, int64_t last, int64_t count, float *out, int64_t stride) {
    if (!w.tensor_scale) return;
    for (int64_t r = 16 * first; r < 16 * last; ++r) {
        const float by = w.tensor_scale[w.tensor_scales == 1 ? 0 : r * w.tensor_scales / w.rows];
        for (int64_t n = 0; n < count; ++n) out[n * stride + r - 16 * first] *= by;
    }
}

void tiles_times(const Matrix &w, int64_t first, int64_t last, const Rounded &acts, const int64_t *rows, int64_t count,
                 float *out, int64_t stride) {
    tiles()->times(w, first, last, acts, rows, count, out, stride);
    scale_tiles(w, first, last, count, out, stride);
}

// How many tiles a task takes: long runs of memory for one row of activations, a second cache's worth for many.
int64_t tiles_per_task(const Matrix &w, int64_t tiles_in_all, int64_t count) {
    const int64_t most = count == 1 ? std::max<int64_t>(1, (256 << 10) / (w.cols * 8)) : 8;
    const int64_t fair = tiles_in_all / (Pool::get().threads() * 4);
    return std::max<int64_t>(1, std::min(most, fair));
}

constexpr int64_t BLOCK = 64;  // rows of activations that pass a task's tiles together

const int64_t *counting(int64_t count) {
    thread_local std::vector<int64_t> numbers;
    for (int64_t i = static_cast<int64_t>(numbers.size()); i < count; ++i) numbers.push_back(i);
    return numbers.data();
}

void linear_tiled(const Matrix &w, const float *x, int64_t tokens, float *y) {
    const Rounded acts = round_for(w, x, tokens);
    const int64_t *all = counting(tokens), n = w.rows / 16, step = tiles_per_task(w, n, tokens);
    Pool::get().each((n + step - 1) / step, [&](int64_t task) {
        const int64_t first = task * step, last = std::min(n, first + step);
        for (int64_t t = 0; t < tokens; t += BLOCK)
            tiles_times(w, first, last, acts, all + t, std::min(BLOCK, tokens - t), y + t * w.rows + 16 * first, w.rows);
    });
}

// The experts of a call: pairs of token and choice, those of one expert together.
struct Groups {
    std::vector<int64_t> order, owners, starts;
    Groups(const int64_t *index, int64_t tokens, int64_t k) : order(tokens * k), owners(tokens * k) {
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
        for (int64_t p = 0; p < tokens * k; ++p) {
            if (p == 0 || index[order[p]] != index[order[p - 1]]) starts.push_back(p);
            owners[p] = order[p] / k;
        }
        starts.push_back(tokens * k);
    }
    int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
};

// out [tokens, size]: the k rows of each token in their order, then `base`, if there is one.
void sum_pairs(const float *rows, int64_t tokens, int64_t k, int64_t size, const float *base, float *out) {
    Pool::get().each(tokens, [&](int64_t t) {
        const float *from = rows + t * k * size;
        float *to = out + t * size;
        for (int64_t i = 0; i < size; ++i) {
            float sum = from[i];
            for (int64_t j = 1; j < k; ++j) sum += from[j * size + i];
            to[i] = base ? sum + base[t * size + i] : sum;
        }
    });
}

void experts_tiled(const Matrix &gate_up, const Matrix &down, const float *x, int64_t tokens, int64_t k,
                   const int64_t *index, const float *weight, const float *base, float *out) {
    const int64_t pairs = tokens * k, inner = down.cols, hidden = down.rows, half = inner / 16, n = hidden / 16;
    const Groups groups(index, tokens, k);
    const Rounded acts = round_for(gate_up, x, tokens);
    float *middle = scratch<float>(PAIRS, pairs * inner);
    // Gate and up of the same rows: two runs of memory a task.
    const int64_t step = std::max<int64_t>(1, std::min(half, tiles_per_task(gate_up, half * groups.count(), tokens)));
    const int64_t cuts = (half + step - 1) / step;
    Pool::get().each(groups.count() * cuts, [&](int64_t task) {
        const int64_t g = task / cuts, first = task % cuts * step, last = std::min(half, first + step);
        const int64_t begin = groups.starts[g], end = groups.starts[g + 1], width = 16 * (last - first);
        const Matrix w = nth(gate_up, index[groups.order[begin]]);
        float *up = scratch<float>(TASK, BLOCK * width);
        for (int64_t p = begin; p < end; p += BLOCK) {
            const int64_t count = std::min(BLOCK, end - p);
            float *gate = middle + p * inner + 16 * first;
            tiles_times(w, first, last, acts, groups.owners.data() + p, count, gate, inner);
            tiles_times(w, half + first, half + last, acts, groups.owners.data() + p, count, up, width);
            for (int64_t i = 0; i < count; ++i) tiles()->silu_times(gate + i * inner, up + i * width, width);
        }
    });

    const Rounded between = round_for(down, middle, pairs, true);
    if (tokens == 1) {
        // Every task has all k experts' sums of its rows, and adds them in the router's order.
        std::vector<int64_t> place(k);
        for (int64_t p = 0; p < k; ++p) place[groups.order[p]] = p;
        const int64_t wide = tiles_per_task(down, n, 1);
        Pool::get().each((n + wide - 1) / wide, [&](int64_t task) {
            const int64_t first = task * wide, last = std::min(n, first + wide), width = 16 * (last - first);
            float *made = scratch<float>(TASK, width), *to = out + 16 * first;
            for (int64_t j = 0; j < k; ++j) {
                tiles_times(nth(down, index[j]), first, last, between, &place[j], 1, made, width);
                for (int64_t i = 0; i < width; ++i) {
                    const float part = made[i] * weight[j];
                    to[i] = j ? to[i] + part : part;
                }
            }
            if (base)
                for (int64_t i = 0; i < width; ++i) to[i] += base[16 * first + i];
        });
        return;
    }
    // middle has been rounded: `made` may take more of the same memory.
    float *made = scratch<float>(PAIRS, pairs * hidden);
    const int64_t *all = counting(pairs), wide = tiles_per_task(down, n * groups.count(), tokens);
    const int64_t parts = (n + wide - 1) / wide;
    Pool::get().each(groups.count() * parts, [&](int64_t task) {
        const int64_t g = task / parts, first = task % parts * wide, last = std::min(n, first + wide);
        const int64_t begin = groups.starts[g], end = groups.starts[g + 1], width = 16 * (last - first);
        const Matrix w = nth(down, index[groups.order[begin]]);
        float *here = scratch<float>(TASK, BLOCK * width);
        for (int64_t p = begin; p < end; p += BLOCK) {
            const int64_t count = std::min(BLOCK, end - p);
            tiles_times(w, first, last, between, all + p, count, here, width);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t pair = groups.order[p + i];
                float *to = made + pair * hidden + 16 * first;
                for (int64_t r = 0; r < width; ++r) to[r] = here[i * width + r] * weight[pair];
            }
        }
    });
    sum_pairs(made, tokens, k, hidden, base, out);
}

// gate[i] = silu(gate[i]) * up[i] for gate [tokens, rows] and then up [tokens, rows] in `made`.
void close_gates(int64_t rows, int64_t tokens, float *made) {
    float *up = made + tokens * rows;
    if (tokens == 1) return tiles()->silu_times(made, up, rows);
    Pool::get().each(tokens, [&](int64_t t) { tiles()->silu_times(made + t * rows, up + t * rows, rows); });
}

}  // namespace

extern "C" {

// The version of this interface; __init__.py asks for the one it was written for.
int32_t qwenrun_cpu_version() { return 5; }
int32_t qwenrun_cpu_avx2() { return has_avx2(); }
// Which instructions tiled matrices are multiplied with.
const char *qwenrun_cpu_tiles() { return tiles() ? tiles()->name : ""; }
int32_t qwenrun_cpu_threads() { return Pool::get().threads(); }

// y float [tokens, rows] = x float [tokens, cols] times w transposed.
void qwenrun_cpu_linear(const Matrix *w, const float *x, int64_t tokens, float *y) {
    if (w->tile) return linear_tiled(*w, x, tokens, y);
    const Acts acts = prepare(*w, x, tokens);
    std::vector<int64_t> all(tokens);
    std::iota(all.begin(), all.end(), 0);
    const std::vector<Piece> pieces = cut(w->rows, 1);
    Pool::get().each(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const auto [group, first, last] = pieces[i];
        if (tokens == 1) return block_times(*w, first, last, acts, all.data(), 1, y + first, 1);
        std::vector<float> out(TOKENS * (last - first));
        for (int64_t t = 0; t < tokens; t += TOKENS) {
            const int64_t count = std::min(TOKENS, tokens - t);
            block_times(*w, first, last, acts, all.data() + t, count, out.data(), count);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t r = first; r < last; ++r) y[(t + n) * w->rows + r] = out[(r - first) * count + n];
        }
    });
}

// y: float [tokens, rows] of each of `count` matrices, one after the other; all read the same x [tokens, cols], or,
// if norm [cols] is not null, its zero-centred rms norm.
void qwenrun_cpu_linears(const Matrix *const *ws, int64_t count, const float *x, int64_t tokens, const float *norm,
                         float eps, float *y) {
    if (norm) {
        float *normed = scratch<float>(NORMED, tokens * ws[0]->cols);
        qwenrun_cpu_rms_norm(x, norm, 1.0f, eps, tokens, ws[0]->cols, normed);
        x = normed;
    }
    if (tokens > 1 || count == 1) {
        for (int64_t i = 0; i < count; y += tokens * ws[i]->rows, ++i) qwenrun_cpu_linear(ws[i], x, tokens, y);
        return;
    }
    // One token: one loop over the pieces of all matrices. What is alike in two matrices rounds x alike.
    struct Job {
        const Matrix *w;
        const Rounded *tiled;
        const Acts *plain;
        float *y;
        int64_t first, last;
    };
    // At worst every matrix rounds it in its own way, in blocks of 8.
    const int64_t cols = ws[0]->cols;
    int8_t *codes = scratch<int8_t>(CODES, count * cols);
    float *scales = scratch<float>(SCALES, count * 2 * (cols / 8 + 1));
    std::vector<std::unique_ptr<Rounded>> rounded;
    std::vector<std::unique_ptr<Acts>> prepared;
    std::vector<Job> jobs;
    const int64_t zero = 0;
    const Matrix *before = nullptr;
    for (int64_t i = 0; i < count; y += ws[i]->rows, ++i) {
        const Matrix &w = *ws[i];
        const bool same = before && before->kind == w.kind && before->tile == w.tile && before->block == w.block &&
                          before->scale == w.scale && !before->zeros == !w.zeros;
        if (!same) {
            if (w.tile) {
                const int64_t at = static_cast<int64_t>(rounded.size());
                rounded.emplace_back(
                    new Rounded(round_into(w, x, 1, codes + at * cols, scales + at * 2 * (cols / 8 + 1))));
            } else {
                prepared.emplace_back(new Acts(prepare(w, x, 1)));
            }
        }
        before = &w;
        if (w.tile) {
            const int64_t n = w.rows / 16, step = tiles_per_task(w, n, 1);
            for (int64_t t = 0; t < n; t += step)
                jobs.push_back({&w, rounded.back().get(), nullptr, y + 16 * t, t, std::min(n, t + step)});
        } else {
            const int64_t step = rows_per_task(w.rows, 1);
            for (int64_t r = 0; r < w.rows; r += step)
                jobs.push_back({&w, nullptr, prepared.back().get(), y + r, r, std::min(w.rows, r + step)});
        }
    }
    Pool::get().each(static_cast<int64_t>(jobs.size()), [&](int64_t i) {
        const Job &job = jobs[i];
        if (job.tiled) tiles_times(*job.w, job.first, job.last, *job.tiled, &zero, 1, job.y, 0);
        else block_times(*job.w, job.first, job.last, *job.plain, &zero, 1, job.y, 1);
    });
}

// y [tokens, down.rows] = down(silu(gate x) * up x).
void qwenrun_cpu_swiglu(const Matrix *gate, const Matrix *up, const Matrix *down, const float *x, int64_t tokens,
                        float *y) {
    const Matrix *both[] = {gate, up};
    float *made = scratch<float>(GATES, 2 * tokens * gate->rows);
    qwenrun_cpu_linears(both, 2, x, tokens, nullptr, 0.0f, made);
    close_gates(gate->rows, tokens, made);
    qwenrun_cpu_linear(down, made, tokens, y);
}

// From a mixer's result to the routed experts; see kernels/ops.py. stream, normed, base [tokens, H]; index, weight
// [tokens, k].
void qwenrun_cpu_moe_entry(const Matrix *router, const Matrix *gate, const Matrix *up, const Matrix *down,
                           const Matrix *shared_gate, const float *norm, float eps, int64_t k, const float *x,
                           const float *y, int64_t tokens, float *stream, float *normed, float *base, int64_t *index,
                           float *weight) {
    const int64_t hidden = router->cols, inner = tokens * gate->rows, count = router->rows;
    auto add = [&](int64_t t) {
        const int64_t begin = t * hidden, end = begin + hidden;
        for (int64_t i = begin; i < end; ++i) stream[i] = x[i] + y[i];
        qwenrun_cpu_rms_norm(stream + begin, norm, 1.0f, eps, 1, hidden, normed + begin);
    };
    if (tokens < 4) for (int64_t t = 0; t < tokens; ++t) add(t);
    else Pool::get().each(tokens, add);
    const Matrix *all[] = {gate, up, shared_gate, router};
    float *made = scratch<float>(ENTRY, 2 * inner + tokens * (1 + count)), *share = made + 2 * inner;
    qwenrun_cpu_linears(all, 4, normed, tokens, nullptr, 0.0f, made);
    qwenrun_cpu_top_k(share + tokens, tokens, count, k, index, weight);
    close_gates(gate->rows, tokens, made);
    qwenrun_cpu_linear(down, made, tokens, base);
    auto mix = [&](int64_t t) {
        const float by = 1.0f / (1.0f + std::exp(-share[t]));
        for (int64_t i = t * hidden; i < (t + 1) * hidden; ++i) base[i] = stream[i] + by * base[i];
    };
    if (tokens < 4) for (int64_t t = 0; t < tokens; ++t) mix(t);
    else Pool::get().each(tokens, mix);
}

// out float [tokens, hidden]: for each token the sum over its k experts, in order, of weight x down(silu(gate x) *
// up x), and then of base, unless that is null. gate_up and down are stacks; index int64 [tokens, k] says which of
// them, and none but those is read.
void qwenrun_cpu_experts(const Matrix *gate_up, const Matrix *down, const float *x, int64_t tokens, int64_t k,
                         const int64_t *index, const float *weight, const float *base, float *out) {
    if (gate_up->tile) return experts_tiled(*gate_up, *down, x, tokens, k, index, weight, base, out);
    const int64_t pairs = tokens * k, inner = down->cols, hidden = down->rows;
    const Groups grouped(index, tokens, k);
    const std::vector<int64_t> &order = grouped.order, &owners = grouped.owners, &starts = grouped.starts;
    const int64_t groups = grouped.count();
    const Acts acts = prepare(*gate_up, x, tokens);
    std::unique_ptr<float[]> middle(new float[pairs * inner]);
    std::vector<Piece> pieces = cut(inner, groups);
    Pool::get().each(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const Piece piece = pieces[i];
        const Matrix w = nth(*gate_up, index[order[starts[piece.group]]]);
        const int64_t size = piece.last - piece.first;
        std::vector<float> gate(TOKENS * size), up(TOKENS * size);
        for (int64_t p = starts[piece.group]; p < starts[piece.group + 1]; p += TOKENS) {
            const int64_t count = std::min(TOKENS, starts[piece.group + 1] - p);
            block_times(w, piece.first, piece.last, acts, owners.data() + p, count, gate.data(), count);
            block_times(w, piece.first + inner, piece.last + inner, acts, owners.data() + p, count, up.data(), count);
            for (int64_t n = 0; n < count; ++n)
                for (int64_t r = 0; r < size; ++r) {
                    const float g = gate[r * count + n];
                    middle[(p + n) * inner + piece.first + r] = g / (1.0f + std::exp(-g)) * up[r * count + n];
                }
        }
    });

    const Acts between = prepare(*down, middle.get(), pairs);
    std::vector<int64_t> all(pairs);
    std::iota(all.begin(), all.end(), 0);
    std::unique_ptr<float[]> made(new float[pairs * hidden]);
    pieces = cut(hidden, groups);
    Pool::get().each(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const Piece piece = pieces[i];
        const Matrix w = nth(*down, index[order[starts[piece.group]]]);
        const int64_t size = piece.last - piece.first;
        std::vector<float> made_here(TOKENS * size);
        for (int64_t p = starts[piece.group]; p < starts[piece.group + 1]; p += TOKENS) {
            const int64_t count = std::min(TOKENS, starts[piece.group + 1] - p);
            block_times(w, piece.first, piece.last, between, all.data() + p, count, made_here.data(), count);
            for (int64_t n = 0; n < count; ++n) {
                const int64_t pair = order[p + n];
                for (int64_t r = 0; r < size; ++r)
                    made[pair * hidden + piece.first + r] = made_here[r * count + n] * weight[pair];
            }
        }
    });
    sum_pairs(made.get(), tokens, k, hidden, base, out);
}
}
