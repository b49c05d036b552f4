// What a layer does beside products with matrices: norms, rotary, the causal convolution, the gated delta rule,
// attention over a KV cache. Float32 arithmetic; a token's bits do not depend on how many tokens a call has.
// Needs AVX2, FMA and F16C: the caller has asked for them. Knows no Python object and no torch.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "pool.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#endif

#include "floats.h"

namespace {

// Memory for one call, kept by its thread.
float *room(int which, int64_t count) {
    struct Piece {
        float *data = nullptr;
        int64_t size = 0;
        ~Piece() { delete[] data; }
    };
    thread_local Piece pieces[3];
    Piece &piece = pieces[which];
    if (piece.size < count) {
        delete[] piece.data;
        piece.data = nullptr;
        piece.data = new float[count];
        piece.size = count;
    }
    return piece.data;
}

// Few and small: not worth waking anybody.
template <typename F> void each(int64_t count, int64_t floats_each, F &&body) {
    if (count * floats_each < 8192) {
        for (int64_t i = 0; i < count; ++i) body(i);
    } else {
        Pool::get().each(count, body);
    }
}

inline void norm_row(const float *x, const float *w, float shift, float eps, int64_t size, float *out) {
    const float by = 1.0f / std::sqrt(dot(x, x, size) / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * by * (w[i] + shift);
}

constexpr int64_t TAPS = 8;       // of a convolution, at most
constexpr int64_t CHANNELS = 512; // a task of a convolution
constexpr int64_t SLICE = 32;     // values of a head that one task of the delta rule carries
constexpr int64_t KEYS = 256;     // keys and values that one task of attention reads
constexpr int64_t FEW = 16;       // of them converted to float at a time

// Slice of a head's state, rows of `dv` floats apart, one token: decays, is corrected by k, is read by q.
template <int V> inline void delta_token(float *state, int64_t dk, int64_t dv, const float *q, const float *k,
                                         const float *v, float decay, float beta, float *out) {
    v8 held[V], read[V];
    for (int i = 0; i < V; ++i) held[i] = read[i] = v8{};
    for (int64_t d = 0; d < dk; ++d) {
        const v8 by = all8(k[d]);
        for (int i = 0; i < V; ++i) held[i] = fma8(load8(state + d * dv + 8 * i), by, held[i]);
    }
    const v8 g = all8(decay), b = all8(beta);
    for (int i = 0; i < V; ++i) held[i] = b * (load8(v + 8 * i) - g * held[i]);
    for (int64_t d = 0; d < dk; ++d) {
        const v8 key = all8(k[d]), query = all8(q[d]);
        for (int i = 0; i < V; ++i) {
            float *at = state + d * dv + 8 * i;
            const v8 s = fma8(key, held[i], g * load8(at));
            store8(at, s);
            read[i] = fma8(s, query, read[i]);
        }
    }
    for (int i = 0; i < V; ++i) store8(out + 8 * i, read[i]);
}

// `width` floats of one key or value as float32.
inline void to_float(const void *data, int32_t kind, const uint16_t *scales, int64_t row, int64_t at, int64_t width,
                     float *out) {
    if (kind == 0) {
        std::memcpy(out, static_cast<const float *>(data) + at, width * sizeof(float));
    } else if (kind == 1) {
        const uint16_t *from = static_cast<const uint16_t *>(data) + at;
        for (int64_t i = 0; i < width; ++i) {
            const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
            std::memcpy(out + i, &bits, 4);
        }
    } else {
        // A half float's bits, moved to a float's place, are 2^-112 of it; infinities do not occur.
        const uint32_t half = scales[row], bits = (half & 0x7FFFu) << 13;
        float scale;
        std::memcpy(&scale, &bits, 4);
        scale *= half & 0x8000u ? -0x1p112f : 0x1p112f;
        const int8_t *from = static_cast<const int8_t *>(data) + at;
        for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(from[i]) * scale;
    }
}

}  // namespace

extern "C" {

// out [rows, size]: each row of x times 1 / rms, times (w + shift).
void qwenrun_cpu_rms_norm(const float *x, const float *w, float shift, float eps, int64_t rows, int64_t size,
                          float *out) {
    each(rows, size, [&](int64_t r) { norm_row(x + r * size, w, shift, eps, size, out + r * size); });
}

// out [rows, size]: rms norm of o with the plain weight w, times silu(z).
void qwenrun_cpu_gated_rms_norm(const float *o, const float *w, const float *z, float eps, int64_t rows, int64_t size,
                                float *out) {
    each(rows, size, [&](int64_t r) {
        float *to = out + r * size;
        const float *gate = z + r * size;
        norm_row(o + r * size, w, 0.0f, eps, size, to);
        for (int64_t i = 0; i < size; ++i) to[i] *= silu(gate[i]);
    });
}

// out [T, heads, size]: x with its first 2 x half dimensions turned by cos, sin [T, half].
void qwenrun_cpu_rope(const float *x, const float *cos, const float *sin, int64_t tokens, int64_t heads, int64_t size,
                      int64_t half, float *out) {
    each(tokens * heads, size, [&](int64_t row) {
        const float *a = x + row * size, *c = cos + row / heads * half, *s = sin + row / heads * half;
        float *to = out + row * size;
        for (int64_t i = 0; i < half; ++i) {
            to[i] = a[i] * c[i] - a[half + i] * s[i];
            to[half + i] = a[half + i] * c[i] + a[i] * s[i];
        }
        std::memcpy(to + 2 * half, a + 2 * half, (size - 2 * half) * sizeof(float));
    });
}

// out [T, C]: silu of the causal convolution of u [T, C] with w [C, taps]; state [taps - 1, C] moves on.
void qwenrun_cpu_conv(const float *u, const float *w, float *state, int64_t tokens, int64_t channels, int64_t taps,
                      float *out) {
    const int64_t before = taps - 1;
    each((channels + CHANNELS - 1) / CHANNELS, CHANNELS * tokens, [&](int64_t task) {
        const int64_t first = task * CHANNELS, count = channels - first < CHANNELS ? channels - first : CHANNELS;
        float by[TAPS][CHANNELS];
        for (int64_t c = 0; c < count; ++c)
            for (int64_t j = 0; j < taps; ++j) by[j][c] = w[(first + c) * taps + j];
        auto row = [&](int64_t t) { return (t < 0 ? state + (t + before) * channels : u + t * channels) + first; };
        for (int64_t t = 0; t < tokens; ++t) {
            float *to = out + t * channels + first;
            const float *x = row(t - before);
            for (int64_t c = 0; c < count; ++c) to[c] = by[0][c] * x[c];
            for (int64_t j = 1; j < taps; ++j) {
                x = row(t - before + j);
                for (int64_t c = 0; c < count; ++c) to[c] += by[j][c] * x[c];
            }
            for (int64_t c = 0; c < count; ++c) to[c] = silu(to[c]);
        }
        for (int64_t j = 0; j < before; ++j) {
            const float *x = row(tokens - before + j);
            if (x != state + j * channels + first) std::memcpy(state + j * channels + first, x, count * sizeof(float));
        }
    });
}

// The gated delta rule over T tokens; q, k, v have rows `stride` floats apart. See kernels/ops.py.
void qwenrun_cpu_delta_rule(const float *q, const float *k, const float *v, const float *g, const float *beta,
                            float *state, int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t dk,
                            int64_t dv, int64_t q_stride, int64_t k_stride, int64_t v_stride, float *out) {
    float *keys = room(0, tokens * key_heads * dk), *queries = room(1, tokens * key_heads * dk);
    const float root = 1.0f / std::sqrt(static_cast<float>(dk));
    each(tokens * key_heads, 2 * dk, [&](int64_t i) {
        const int64_t t = i / key_heads, h = i % key_heads;
        const float *x = k + t * k_stride + h * dk, *y = q + t * q_stride + h * dk;
        float *key = keys + (h * tokens + t) * dk, *query = queries + (h * tokens + t) * dk;
        const float a = 1.0f / std::sqrt(dot(x, x, dk) + 1e-6f), b = root / std::sqrt(dot(y, y, dk) + 1e-6f);
        for (int64_t d = 0; d < dk; ++d) key[d] = x[d] * a, query[d] = y[d] * b;
    });
    const int64_t slices = (dv + SLICE - 1) / SLICE, shared = value_heads / key_heads;
    each(value_heads * slices, SLICE * dk, [&](int64_t task) {
        const int64_t head = task / slices, from = task % slices * SLICE;
        const int64_t width = dv - from < SLICE ? dv - from : SLICE;
        const float *key = keys + head / shared * tokens * dk, *query = queries + head / shared * tokens * dk;
        float *s = state + head * dk * dv + from;
        for (int64_t t = 0; t < tokens; ++t, key += dk, query += dk) {
            const float decay = exp_float(g[t * value_heads + head]), b = beta[t * value_heads + head];
            const float *value = v + t * v_stride + head * dv + from;
            float *to = out + (t * value_heads + head) * dv + from;
            int64_t i = 0;
            if (width == SLICE) {
                delta_token<4>(s, dk, dv, query, key, value, decay, b, to);
                continue;
            }
            for (; i + 8 <= width; i += 8) delta_token<1>(s + i, dk, dv, query, key, value + i, decay, b, to + i);
            for (; i < width; ++i) {
                float held = 0.0f, read = 0.0f;
                for (int64_t d = 0; d < dk; ++d) held += s[d * dv + i] * key[d];
                held = b * (value[i] - decay * held);
                for (int64_t d = 0; d < dk; ++d) {
                    s[d * dv + i] = decay * s[d * dv + i] + key[d] * held;
                    read += s[d * dv + i] * query[d];
                }
                to[i] = read;
            }
        }
    });
}

// A DeltaNet layer between its projections: qkv [T, C] and z [T, nv, dv], b and a [T, nv] in, out [T, nv, dv].
// decay [nv] is -exp(A_log).
void qwenrun_cpu_delta_net(const float *qkv, const float *z, const float *b, const float *a, const float *conv_weight,
                           float *conv_state, const float *decay, const float *dt_bias, const float *norm, float eps,
                           float *state, int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv,
                           int64_t taps, float *out) {
    const int64_t keys = key_heads * dk, channels = 2 * keys + value_heads * dv, many = tokens * value_heads;
    float *mixed = room(2, tokens * channels + 2 * many + many * dv), *beta = mixed + tokens * channels;
    float *g = beta + many, *read = g + many;
    qwenrun_cpu_conv(qkv, conv_weight, conv_state, tokens, channels, taps, mixed);
    for (int64_t i = 0; i < many; ++i) {
        beta[i] = 1.0f / (1.0f + exp_float(-b[i]));
        const float x = a[i] + dt_bias[i % value_heads];
        // log(1 + e^x) without overflow; beyond 20 it is x.
        g[i] = decay[i % value_heads] * (x > 20.0f ? x : std::log1p(exp_float(x)));
    }
    qwenrun_cpu_delta_rule(mixed, mixed + keys, mixed + 2 * keys, g, beta, state, tokens, key_heads, value_heads, dk, dv,
                           channels, channels, channels, read);
    qwenrun_cpu_gated_rms_norm(read, norm, z, eps, many, dv, out);
}

// Attention of few queries q [T, Hq, D] over S cached keys and values [S, Hkv, D], causal, the last query sees all.
// kind 0: float32, 1: bf16, 2: int8 with half float scales [S, Hkv]; strides in elements. The cache is cut into runs
// of KEYS rows, whose results are merged in their order.
void qwenrun_cpu_attention(const float *q, const void *k, const void *v, const uint16_t *k_scales,
                           const uint16_t *v_scales, int32_t kind, int64_t tokens, int64_t length, int64_t heads,
                           int64_t groups, int64_t size, float scale, float *out) {
    const int64_t shared = heads / groups, many = shared * tokens, runs = (length + KEYS - 1) / KEYS;
    // For each run and group: of every query the maximum, the sum, and the mixed values.
    const int64_t entry = size + 2;
    float *parts = room(0, runs * groups * many * entry);
    each(runs * groups, KEYS * size, [&](int64_t task) {
        const int64_t group = task % groups, first = task / groups * KEYS;
        const int64_t last = first + KEYS < length ? first + KEYS : length;
        float *part = parts + task * many * entry, *rows = room(2, FEW * size + many * FEW);
        float *scores = rows + FEW * size;
        for (int64_t m = 0; m < many; ++m) {
            part[m * entry] = -__builtin_inff();
            std::memset(part + m * entry + 1, 0, (size + 1) * sizeof(float));
        }
        for (int64_t low = first; low < last; low += FEW) {
            const int64_t count = last - low < FEW ? last - low : FEW;
            for (int64_t s = 0; s < count; ++s) {
                const int64_t row = (low + s) * groups + group;
                to_float(k, kind, k_scales, row, row * size, size, rows + s * size);
            }
            for (int64_t m = 0; m < many; ++m) {
                const int64_t t = m / shared, seen = length - tokens + t + 1 - low;
                const float *query = q + (t * heads + group * shared + m % shared) * size;
                for (int64_t s = 0; s < count; ++s)
                    scores[m * FEW + s] = s < seen ? dot(query, rows + s * size, size) * scale : -__builtin_inff();
            }
            for (int64_t s = 0; s < count; ++s) {
                const int64_t row = (low + s) * groups + group;
                to_float(v, kind, v_scales, row, row * size, size, rows + s * size);
            }
            for (int64_t m = 0; m < many; ++m) {
                float *top = part + m * entry, *score = scores + m * FEW, most = top[0];
                for (int64_t s = 0; s < count; ++s) most = score[s] > most || score[s] != score[s] ? score[s] : most;
                if (most == -__builtin_inff()) continue;  // this query sees none of them
                const float less = exp_float(top[0] - most);
                float *mixed = top + 2;
                top[0] = most;
                top[1] *= less;
                if (less != 1.0f)
                    for (int64_t i = 0; i < size; ++i) mixed[i] *= less;
                for (int64_t s = 0; s < count; ++s) {
                    const float weight = exp_float(score[s] - most);
                    const float *value = rows + s * size;
                    top[1] += weight;
                    int64_t i = 0;
                    for (; i + 8 <= size; i += 8) store8(mixed + i, fma8(all8(weight), load8(value + i), load8(mixed + i)));
                    for (; i < size; ++i) mixed[i] += weight * value[i];
                }
            }
        }
    });
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t group = h / shared, m = t * shared + h % shared;
            float most = -__builtin_inff(), total = 0.0f, *to = out + (t * heads + h) * size;
            for (int64_t run = 0; run < runs; ++run) {
                const float top = parts[((run * groups + group) * many + m) * entry];
                most = top > most || top != top ? top : most;
            }
            std::memset(to, 0, size * sizeof(float));
            for (int64_t run = 0; run < runs; ++run) {
                const float *part = parts + ((run * groups + group) * many + m) * entry;
                const float by = exp_float(part[0] - most);
                total += by * part[1];
                for (int64_t i = 0; i < size; ++i) to[i] += by * part[2 + i];
            }
            for (int64_t i = 0; i < size; ++i) to[i] /= total;
        }
}

// The top k of softmax(logits [T, E]), renormalised to sum 1; of equals the first.
void qwenrun_cpu_top_k(const float *logits, int64_t tokens, int64_t count, int64_t k, int64_t *index, float *weight) {
    each(tokens, 8 * count, [&](int64_t t) {
        float *x = room(2, count);
        std::memcpy(x, logits + t * count, count * sizeof(float));
        int64_t *chosen = index + t * k;
        float *w = weight + t * k, total = 0.0f, bad = 0.0f;
        for (int64_t e = 0; e < count; ++e) bad += x[e] * 0.0f;
        for (int64_t j = 0; j < k; ++j) {
            int64_t best = 0;
            for (int64_t e = 1; e < count; ++e) best = x[e] > x[best] ? e : best;
            chosen[j] = best;
            w[j] = exp_float(x[best] - logits[t * count + chosen[0]]);
            x[best] = -__builtin_inff();
            total += w[j];
        }
        for (int64_t j = 0; j < k; ++j) w[j] = w[j] / total + bad;
    });
}
}
#if defined(__clang__) && defined(__x86_64__)
#pragma clang attribute pop
#endif
