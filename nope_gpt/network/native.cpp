// A few tokens through the whole network, as fast as the memory gives up its weights.
//
// With one token, or a few, every weight is read from memory and used once or a few times,
// so that reading them is the time it takes. Here one team of threads goes through all
// layers, each thread over its rows of each matrix, in a single parallel region.
//
// A token is computed by the same operations in the same order whatever tokens are beside
// it and however many threads there are: a row of a batch is bit for bit the row alone. So
// where a compiler could join a product and a sum in one place and not in another, std::fma
// says that it must.
//
// Weights are float, bfloat16, or 8-bit integers with a scale for each row; sums are float.
//
// Shapes: M tokens, C embedding dimensions, V vocabulary, H query heads, G key/value heads,
// R = H/G, D head dimensions, F hidden dimensions, N visible entries of the cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "native_vectors.h"

namespace {

constexpr int64_t CHUNK = 256;  // Entries of the cache that one thread attends to at a time.
constexpr int64_t ROWS = 8;     // Rows of a matrix that a thread takes at a time.
constexpr int SIDE = 4;         // Of these, rows that are read side by side.
constexpr int64_t AHEAD = 64;   // Entries by which keys are sent for before they are read.

// What a weight is multiplied by: bfloat16 where the processor does that by itself.
#ifdef __AVX512BF16__
template <class W>
using Operand = std::conditional_t<std::is_same_v<W, bfloat16>, bfloat16, float>;
#else
template <class W>
using Operand = float;
#endif

// The sum of products of some lanes of a weight and of an operand, and how many they are.
template <class W>
constexpr int64_t STEP = LANES;

template <class W>
struct Read {
    Floats lanes_of;
    explicit Read(const W* from) : lanes_of(lanes(from)) {}
};

template <class W>
inline void multiply_add(Floats& total, const Read<W>& weight, const Read<float>& x) {
    total += weight.lanes_of * x.lanes_of;
}

#ifdef __AVX512BF16__
template <>
constexpr int64_t STEP<bfloat16> = 2 * LANES;

template <>
struct Read<bfloat16> {
    __m512bh lanes_of;
    explicit Read(const bfloat16* from) : lanes_of(raw<__m512bh>(from)) {}
};

inline void multiply_add(Floats& total, const Read<bfloat16>& weight, const Read<bfloat16>& x) {
    total = (Floats)_mm512_dpbf16_ps((__m512)total, weight.lanes_of, x.lanes_of);
}
#endif

// Rows of a matrix by tokens: each row is read once for all of them. Meanwhile the rows that
// come next are sent for: the processor by itself foresees one stream, but not several.
template <int R, int M, class W, class X>
inline void tile(const W* weight, const X* x, int64_t size, float* result) {
    Floats totals[R][M] = {};
    int64_t i = 0;
    for (; i + STEP<W> <= size; i += STEP<W>)
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(weight + (r + ROWS) * size + i, 0, 2);
            Read<W> row(weight + r * size + i);
            for (int m = 0; m < M; m++) multiply_add(totals[r][m], row, Read<X>(x + m * size + i));
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            float total = sum(totals[r][m]);
            for (int64_t k = i; k < size; k++)
                total = std::fma(one(weight + r * size + k), one(x + m * size + k), total);
            result[m * LANES + r] = total;
        }
}

// The rows that a thread takes at a time, side by side.
template <int M, class W, class X>
inline void some_rows(const W* weight, const X* x, int64_t size, int64_t count, float* results) {
    int64_t r = 0;
    for (; r + SIDE <= count; r += SIDE) tile<SIDE, M>(weight + r * size, x, size, results + r);
    for (; r < count; r++) tile<1, M>(weight + r * size, x, size, results + r);
}

struct Matrix {
    const void* weight;  // [rows, size]
    const float* scale;  // [rows], or none
};

}  // namespace

extern "C" {

struct Layer {
    const float *attention_norm, *feed_forward_norm;
    Matrix q, k, v, out, up, down;
};

struct Network {
    int64_t C, V, H, G, D, F, num_layers;
    int64_t kind;  // Of the weights: 0 float, 1 bfloat16, 2 integers.
    double epsilon;
    double growth;           // Of the scores with the entries that are seen,
    int64_t growth_length;   // beyond so many.
    Matrix embedding;
    const float* norm;
    const Layer* layers;
};

struct Cache {
    char* memory;       // [layers, keys and values, rows, G, capacity, D]
    int64_t is_half;    // Whether it holds bfloat16, and not float.
    int64_t num_rows, capacity;
};

struct Token {
    int64_t id;
    int64_t row;      // Of the cache.
    int64_t slot;     // Where its own entry goes.
    int64_t visible;  // Entries it attends to, its own included, from the first slot on.
};

}  // extern "C"

namespace {

template <class W, class T>
struct Step {
    using X = Operand<W>;

    const Network& net;
    const Cache& cache;
    const Token* tokens;
    const int64_t M;
    const int64_t R = net.H / net.G;
    const int64_t kv = net.G * net.D;
    const int64_t num_chunks = most_visible() / CHUNK + 1;
    const int64_t partial = R * (net.D + 2);
    std::vector<float> x = std::vector<float>(M * net.C), q = std::vector<float>(M * net.C);
    std::vector<float> partials = std::vector<float>(M * net.G * num_chunks * partial);
    std::vector<X> hidden = std::vector<X>(M * net.F);

    int64_t most_visible() const {
        int64_t most = 0;
        for (int64_t m = 0; m < M; m++) most = std::max(most, tokens[m].visible);
        return most;
    }

    T* entries(int64_t layer, int which, int64_t row, int64_t group) const {
        int64_t index = ((layer * 2 + which) * cache.num_rows + row) * net.G + group;
        return reinterpret_cast<T*>(cache.memory) + index * cache.capacity * net.D;
    }

    // Where number i of a token's new keys or values goes.
    T* entry(int64_t layer, int which, int64_t m, int64_t i) const {
        return entries(layer, which, tokens[m].row, i / net.D) + tokens[m].slot * net.D + i % net.D;
    }

    // Everything below is called by all threads of a team. What takes less time than waiting
    // for each other does, every thread does for itself.

    void read_embeddings() {
#pragma omp for
        for (int64_t m = 0; m < M; m++) {
            const W* row = static_cast<const W*>(net.embedding.weight) + tokens[m].id * net.C;
            float scale = net.embedding.scale ? net.embedding.scale[tokens[m].id] : 1.0f;
            for (int64_t c = 0; c < net.C; c++) x[m * net.C + c] = scale * one(row + c);
        }
    }

    void normalize(const float* weight, X* to) const {
        for (int64_t m = 0; m < M; m++) {
            const float* row = &x[m * net.C];
            float scale = 1.0f / std::sqrt(dot(row, row, net.C) / net.C + float(net.epsilon));
            for (int64_t c = 0; c < net.C; c++) put(to + m * net.C + c, row[c] * scale * weight[c]);
        }
    }

    // Products of a matrix [rows, size] and the tokens' operands from the first on; `store` is
    // called with a token, a row and LANES of results, of which `count` are rows side by side.
    template <class Store>
    void multiply(const Matrix& a, int64_t rows, int64_t size, const X* from, int64_t first, Store store) const {
        int64_t num_blocks = (rows + ROWS - 1) / ROWS;
#pragma omp for schedule(static) nowait
        for (int64_t block = 0; block < num_blocks; block++) {
            int64_t row = block * ROWS, count = std::min(ROWS, rows - row);
            const W* weight = static_cast<const W*>(a.weight) + row * size;
            float scales[LANES] = {}, results[4][LANES] = {};
            for (int64_t r = 0; r < count; r++) scales[r] = a.scale ? a.scale[row + r] : 1.0f;
            for (int64_t m = first, width; m < M; m += width) {
                width = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
                const X* x = from + m * size;
                if (width == 4) some_rows<4>(weight, x, size, count, results[0]);
                if (width == 2) some_rows<2>(weight, x, size, count, results[0]);
                if (width == 1) some_rows<1>(weight, x, size, count, results[0]);
                for (int64_t i = 0; i < width; i++) store(m + i, row, count, lanes(results[i]) * lanes(scales));
            }
        }
    }

    // What a score is multiplied by where so many entries are seen.
    float score_scale(int64_t visible) const {
        double beyond = net.growth ? std::max(double(visible) / double(net.growth_length), 1.0) : 1.0;
        return float((1.0 + net.growth * std::log(beyond)) / std::sqrt(double(net.D)));
    }

    // For the heads of a group over a chunk of the cache: the largest score, the sum of the
    // exponentials below it, and the values weighted by them; `gather` joins the chunks.
    void attend(int64_t layer) {
#pragma omp for collapse(3) schedule(dynamic, 1)
        for (int64_t m = 0; m < M; m++)
            for (int64_t g = 0; g < net.G; g++)
                for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
                    int64_t first = chunk * CHUNK, last = std::min(first + CHUNK, tokens[m].visible);
                    if (first >= last) continue;
                    float* part = &partials[((m * net.G + g) * num_chunks + chunk) * partial];
                    const T* keys = entries(layer, 0, tokens[m].row, g) + first * net.D;
                    const T* values = entries(layer, 1, tokens[m].row, g) + first * net.D;
                    const float* queries = &q[m * net.C + g * R * net.D];
                    const float scale = score_scale(tokens[m].visible);
                    for (int64_t h = 0, width; h < R; h += width) {
                        width = R - h >= 4 ? 4 : 1;
                        const float* own = queries + h * net.D;
                        float* to = part + h * (net.D + 2);
                        if (width == 4) attend_to<4>(keys, values, last - first, scale, own, to);
                        else attend_to<1>(keys, values, last - first, scale, own, to);
                    }
                }
    }

    // One chunk for some heads of a group: keys and values are read once for all of them.
    template <int HEADS>
    void attend_to(const T* keys, const T* values, int64_t count, float scale, const float* queries, float* part) const {
        const int64_t padded = (count + LANES - 1) / LANES * LANES, stride = net.D + 2;
        alignas(64) float scores[HEADS][CHUNK];
        for (int64_t n = 0; n < count; n += LANES / HEADS)
            score<HEADS>(keys, values, n, count, queries, scale, scores);
        for (int h = 0; h < HEADS; h++) {
            std::fill(scores[h] + count, scores[h] + padded, -INFINITY);
            Floats most = lanes(scores[h]);
            for (int64_t n = LANES; n < padded; n += LANES) {
                Floats now = lanes(scores[h] + n);
                most = now > most ? now : most;
            }
            float largest = most[0];
            for (int64_t i = 1; i < LANES; i++) largest = std::max(largest, most[i]);
            Floats total{};
            for (int64_t n = 0; n < padded; n += LANES) {
                Floats now = exponential(lanes(scores[h] + n) - largest);
                for (int64_t i = count - n; i < LANES; i++) now[i] = 0.0f;
                std::memcpy(scores[h] + n, &now, sizeof now);
                total += now;
            }
            part[h * stride] = largest;
            part[h * stride + 1] = sum(total);
        }
        int64_t d = 0;
        for (; d + 4 * LANES <= net.D; d += 4 * LANES) weigh<HEADS, 4>(values + d, count, scores, part + 2 + d);
        for (; d + LANES <= net.D; d += LANES) weigh<HEADS, 1>(values + d, count, scores, part + 2 + d);
        for (; d < net.D; d++)
            for (int h = 0; h < HEADS; h++) {
                float total = 0.0f;
                for (int64_t n = 0; n < count; n++) total = std::fma(scores[h][n], one(values + n * net.D + d), total);
                part[h * stride + 2 + d] = total;
            }
    }

    // LANES scores: of some heads and of the entries from number n on, the last one again and
    // again where there are no more.
    template <int HEADS>
    void score(const T* keys, const T* values, int64_t n, int64_t count, const float* queries, float scale, float (*scores)[CHUNK]) const {
        constexpr int ENTRIES = LANES / HEADS;
        const T* key[ENTRIES];
        for (int e = 0; e < ENTRIES; e++) key[e] = keys + std::min(n + e, count - 1) * net.D;
        for (int64_t i = 0; i < ENTRIES * net.D; i += 64 / sizeof(T)) {
            __builtin_prefetch(values + n * net.D + i, 0, 2);
            __builtin_prefetch(keys + (n + AHEAD) * net.D + i, 0, 2);
        }
        Floats totals[LANES] = {};
        int64_t d = 0;
        for (; d + LANES <= net.D; d += LANES)
            for (int e = 0; e < ENTRIES; e++) {
                Floats some = lanes(key[e] + d);
                for (int h = 0; h < HEADS; h++) totals[h * ENTRIES + e] += some * lanes(queries + h * net.D + d);
            }
        Floats all = sums(totals);
        for (; d < net.D; d++)
            for (int e = 0; e < ENTRIES; e++)
                for (int h = 0; h < HEADS; h++)
                    all[h * ENTRIES + e] = std::fma(one(key[e] + d), queries[h * net.D + d], all[h * ENTRIES + e]);
        all *= scale;
        for (int h = 0; h < HEADS; h++)
            std::memcpy(scores[h] + n, reinterpret_cast<const float*>(&all) + h * ENTRIES, ENTRIES * sizeof(float));
    }

    // Of some dimensions, the values weighted by the scores of some heads.
    template <int HEADS, int WIDTH>
    void weigh(const T* values, int64_t count, const float (*scores)[CHUNK], float* part) const {
        Floats totals[HEADS][WIDTH] = {};
        for (int64_t n = 0; n < count; n++) {
            Floats value[WIDTH];
            for (int w = 0; w < WIDTH; w++) value[w] = lanes(values + n * net.D + w * LANES);
            for (int h = 0; h < HEADS; h++) {
                float share = scores[h][n];
                for (int w = 0; w < WIDTH; w++) totals[h][w] += share * value[w];
            }
        }
        for (int h = 0; h < HEADS; h++)
            for (int w = 0; w < WIDTH; w++) put(part + h * (net.D + 2) + w * LANES, totals[h][w]);
    }

    void gather(X* to) const {
        std::vector<float> out(net.D);
        for (int64_t m = 0; m < M; m++)
            for (int64_t h = 0; h < net.H; h++) {
                const float* part = &partials[(m * net.G + h / R) * num_chunks * partial] + h % R * (net.D + 2);
                int64_t count = (tokens[m].visible + CHUNK - 1) / CHUNK;
                float largest = -INFINITY, total = 0.0f;
                for (int64_t i = 0; i < count; i++) largest = std::max(largest, part[i * partial]);
                std::fill(out.begin(), out.end(), 0.0f);
                for (int64_t i = 0; i < count; i++) {
                    float share = std::exp(part[i * partial] - largest);
                    total = std::fma(share, part[i * partial + 1], total);
                    add_scaled(out.data(), share, part + i * partial + 2, net.D);
                }
                for (int64_t d = 0; d < net.D; d++) put(to + m * net.C + h * net.D + d, out[d] / total);
            }
    }

    void run(float* logits, int64_t first) {
        std::vector<X> own(M * net.C);  // The operands of this thread's products.
        auto into_stream = [&](int64_t m, int64_t row, int64_t count, Floats values) {
            for (int64_t r = 0; r < count; r++) x[m * net.C + row + r] += values[r];
        };
        read_embeddings();
        for (int64_t i = 0; i < net.num_layers; i++) {
            const Layer& layer = net.layers[i];
            normalize(layer.attention_norm, own.data());
            multiply(layer.q, net.C, net.C, own.data(), 0, [&](int64_t m, int64_t row, int64_t count, Floats values) {
                std::memcpy(&q[m * net.C + row], &values, count * sizeof(float));
            });
            for (int which = 0; which < 2; which++)
                multiply(which ? layer.v : layer.k, kv, net.C, own.data(), 0,
                         [&](int64_t m, int64_t row, int64_t count, Floats values) {
                             for (int64_t r = 0; r < count; r++) put(entry(i, which, m, row + r), values[r]);
                         });
#pragma omp barrier
            attend(i);
            gather(own.data());
            multiply(layer.out, net.C, net.C, own.data(), 0, into_stream);
#pragma omp barrier
            normalize(layer.feed_forward_norm, own.data());
            multiply(layer.up, net.F, net.C, own.data(), 0, [&](int64_t m, int64_t row, int64_t count, Floats values) {
                values /= 1.0f + exponential(-values);  // SiLU
                for (int64_t r = 0; r < count; r++) put(&hidden[m * net.F + row + r], values[r]);
            });
#pragma omp barrier
            multiply(layer.down, net.C, net.F, hidden.data(), 0, into_stream);
#pragma omp barrier
        }
        normalize(net.norm, own.data());
        multiply(net.embedding, net.V, net.C, own.data(), first, [&](int64_t m, int64_t row, int64_t count, Floats values) {
            std::memcpy(logits + (m - first) * net.V + row, &values, count * sizeof(float));
        });
    }
};

template <class W, class T>
void go(const Network& net, const Cache& cache, const Token* tokens, int64_t M, int64_t first, float* logits, int threads) {
    Step<W, T> step{net, cache, tokens, M};
#pragma omp parallel num_threads(threads)
    step.run(logits, first);
}

template <class W>
void go(const Network& net, const Cache& cache, const Token* tokens, int64_t M, int64_t first, float* logits, int threads) {
    if (cache.is_half) go<W, bfloat16>(net, cache, tokens, M, first, logits, threads);
    else go<W, float>(net, cache, tokens, M, first, logits, threads);
}

}  // namespace

// Read M tokens, add their entries to the cache, and write the logits [M - first, V] of all but
// the first ones.
extern "C" void decode(const Network* net, const Cache* cache, const Token* tokens, int64_t M,
                       int64_t first, float* logits, int64_t threads) {
    if (net->kind == 0) go<float>(*net, *cache, tokens, M, first, logits, threads);
    if (net->kind == 1) go<bfloat16>(*net, *cache, tokens, M, first, logits, threads);
    if (net->kind == 2) go<int8_t>(*net, *cache, tokens, M, first, logits, threads);
}
