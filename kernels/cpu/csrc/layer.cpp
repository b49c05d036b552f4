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
constexpr int64_t KEYS = 512;     // keys and values that one task of attention reads
constexpr int64_t FEW = 16;       // of them converted to float at a time
constexpr int64_t TOGETHER = 8;   // tokens whose queries read the cache together

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

struct Cache {
    const void *k, *v;
    const uint16_t *k_scales, *v_scales;
    int32_t kind;
    int64_t groups, size;
};

// `count` tokens' queries of one key head: `shared` rows of a token follow each other, tokens lie `stride` apart. The
// first token stands at position `first`.
struct Queries {
    const float *q;
    int64_t size, stride, shared, count, first;
    float scale;
    const float *row(int64_t m) const { return q + m / shared * stride + m % shared * size; }
};

// Products of M queries with the FEW keys in rows: out[m * FEW + s]. One sum a pair, in the order of the dimensions.
template <int M> inline void products(const float *const *q, const float *rows, int64_t size, float scale, float *out) {
    for (int64_t s = 0; s < FEW; s += 4) {
        v8 sum[M][4];
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < 4; ++j) sum[m][j] = v8{};
        for (int64_t i = 0; i < size; i += 8) {
            v8 key[4];
            for (int j = 0; j < 4; ++j) key[j] = load8(rows + (s + j) * size + i);
            for (int m = 0; m < M; ++m) {
                const v8 x = load8(q[m] + i);
                for (int j = 0; j < 4; ++j) sum[m][j] = fma8(x, key[j], sum[m][j]);
            }
        }
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < 4; ++j) out[m * FEW + s + j] = sum8(sum[m][j]) * scale;
    }
}

// mixed = mixed * less + the FEW rows times their weights.
inline void mix(float *mixed, float less, const float *weights, const float *rows, int64_t size) {
    const v8 by = all8(less);
    int64_t i = 0;
    for (; i + 32 <= size; i += 32) {
        v8 a[4];
        for (int j = 0; j < 4; ++j) a[j] = load8(mixed + i + 8 * j) * by;
        for (int64_t s = 0; s < FEW; ++s) {
            const v8 w = all8(weights[s]);
            for (int j = 0; j < 4; ++j) a[j] = fma8(w, load8(rows + s * size + i + 8 * j), a[j]);
        }
        for (int j = 0; j < 4; ++j) store8(mixed + i + 8 * j, a[j]);
    }
    for (; i < size; i += 8) {
        v8 a = load8(mixed + i) * by;
        for (int64_t s = 0; s < FEW; ++s) a = fma8(all8(weights[s]), load8(rows + s * size + i), a);
        store8(mixed + i, a);
    }
}

// One run of at most KEYS cached rows, of `length` in all: of every query the maximum, the sum, the mixed values.
inline void attend_run(const Cache &cache, const Queries &queries, int64_t group, int64_t run, int64_t length, float *part) {
    const int64_t size = cache.size, entry = size + 2, many = queries.shared * queries.count;
    const int64_t first = run * KEYS, last = first + KEYS < length ? first + KEYS : length;
    float *rows = room(2, FEW * size + many * FEW), *scores = rows + FEW * size;
    for (int64_t m = 0; m < many; ++m) {
        part[m * entry] = -__builtin_inff();
        std::memset(part + m * entry + 1, 0, (size + 1) * sizeof(float));
    }
    auto fetch = [&](const void *data, const uint16_t *scales, int64_t low, int64_t count) {
        for (int64_t s = 0; s < count; ++s) {
            const int64_t row = (low + s) * cache.groups + group;
            to_float(data, cache.kind, scales, row, row * size, size, rows + s * size);
        }
        std::memset(rows + count * size, 0, (FEW - count) * size * sizeof(float));
    };
    for (int64_t low = first; low < last; low += FEW) {
        const int64_t count = last - low < FEW ? last - low : FEW;
        fetch(cache.k, cache.k_scales, low, count);
        int64_t m = 0;
        for (; m + 2 <= many; m += 2) {
            const float *pair[] = {queries.row(m), queries.row(m + 1)};
            products<2>(pair, rows, size, queries.scale, scores + m * FEW);
        }
        if (m < many) {
            const float *one[] = {queries.row(m)};
            products<1>(one, rows, size, queries.scale, scores + m * FEW);
        }
        fetch(cache.v, cache.v_scales, low, count);
        for (m = 0; m < many; ++m) {
            const int64_t position = queries.first + m / queries.shared, seen = position + 1 - low;
            float *top = part + m * entry, *score = scores + m * FEW, most = top[0];
            for (int64_t s = 0; s < FEW; ++s) {
                if (s >= seen || s >= count) score[s] = -__builtin_inff();
                most = score[s] > most || score[s] != score[s] ? score[s] : most;
            }
            if (most == -__builtin_inff()) continue;  // this query sees none of them
            const float less = exp_float(top[0] - most);
            float total = 0.0f;
            for (int64_t s = 0; s < FEW; ++s) score[s] = exp_float(score[s] - most);
            for (int64_t s = 0; s < FEW; ++s) total += score[s];
            top[0] = most;
            top[1] = top[1] * less + total;
            mix(top + 2, less, score, rows, size);
        }
    }
}

// The runs' results of all queries, put together in their order.
inline void merge_runs(const Queries &queries, int64_t runs, int64_t size, const float *parts, float *out) {
    const int64_t entry = size + 2, many = queries.shared * queries.count;
    for (int64_t m = 0; m < many; ++m) {
        float most = -__builtin_inff(), total = 0.0f;
        float *to = out + m / queries.shared * queries.stride + m % queries.shared * size;
        for (int64_t run = 0; run < runs; ++run) {
            const float top = parts[(run * many + m) * entry];
            most = top > most || top != top ? top : most;
        }
        std::memset(to, 0, size * sizeof(float));
        for (int64_t run = 0; run < runs; ++run) {
            const float *part = parts + (run * many + m) * entry;
            if (part[0] == -__builtin_inff()) continue;
            const float by = exp_float(part[0] - most);
            total += by * part[1];
            for (int64_t i = 0; i < size; ++i) to[i] += by * part[2 + i];
        }
        for (int64_t i = 0; i < size; ++i) to[i] /= total;
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

// Attention of queries q [T, Hq, D] over S cached keys and values [S, Hkv, D], causal, the last query sees all. D is a
// multiple of 8. kind 0: float32, 1: bf16, 2: int8 with half float scales [S, Hkv]. Few queries share the cache's
// runs out among the threads, many are themselves shared out: the arithmetic of a query is the same.
void qwenrun_cpu_attention(const float *q, const void *k, const void *v, const uint16_t *k_scales,
                           const uint16_t *v_scales, int32_t kind, int64_t tokens, int64_t length, int64_t heads,
                           int64_t groups, int64_t size, float scale, float *out) {
    const Cache cache = {k, v, k_scales, v_scales, kind, groups, size};
    const int64_t shared = heads / groups, entry = size + 2;
    auto block = [&](int64_t group, int64_t t, int64_t count) {
        return Queries{q + (t * heads + group * shared) * size, size, heads * size, shared, count, length - tokens + t, scale};
    };
    auto result = [&](int64_t group, int64_t t) { return out + (t * heads + group * shared) * size; };
    if (tokens <= TOGETHER) {
        const int64_t runs = (length + KEYS - 1) / KEYS, many = shared * tokens;
        float *parts = room(0, groups * runs * many * entry);
        each(runs * groups, KEYS * size, [&](int64_t task) {
            const int64_t group = task / runs, run = task % runs;
            attend_run(cache, block(group, 0, tokens), group, run, length, parts + task * many * entry);
        });
        for (int64_t group = 0; group < groups; ++group)
            merge_runs(block(group, 0, tokens), runs, size, parts + group * runs * many * entry, result(group, 0));
        return;
    }
    const int64_t chunks = (tokens + TOGETHER - 1) / TOGETHER;
    Pool::get().each(chunks * groups, [&](int64_t task) {
        const int64_t group = task % groups, t = task / groups * TOGETHER;
        const int64_t count = tokens - t < TOGETHER ? tokens - t : TOGETHER;
        const Queries queries = block(group, t, count);
        const int64_t seen = queries.first + count, runs = (seen + KEYS - 1) / KEYS, many = shared * count;
        float *parts = room(0, runs * many * entry);
        for (int64_t run = 0; run < runs; ++run)
            attend_run(cache, queries, group, run, seen, parts + run * many * entry);
        merge_runs(queries, runs, size, parts, result(group, t));
    });
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
