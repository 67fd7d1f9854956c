// Sixteen numbers at a time, whatever the processor calls them.
//
// Weights are widened to float by hand where the processor can, and a sum is taken in the same
// order everywhere, so that a token's numbers do not depend on what is computed beside it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};

constexpr int64_t LANES = 16;

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = int8_t __attribute__((vector_size(16)));

template <class Vector, class T>
inline Vector raw(const T* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Floats lanes(const float* x) { return raw<Floats>(x); }

// To float, by hand: GCC before 13 widens the parts of a vector one by one.
#if defined(__AVX512F__)
inline Floats lanes(const bfloat16* x) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw<__m256i>(x)), 16);
}
inline Floats lanes(const int8_t* x) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw<__m128i>(x)));
}
#elif defined(__AVX2__)
inline Floats joined(__m256 low, __m256 high) {
    __m256 halves[2] = {low, high};
    return raw<Floats>(halves);
}
inline Floats lanes(const bfloat16* x) {
    auto half = [](const bfloat16* from) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw<__m128i>(from)), 16));
    };
    return joined(half(x), half(x + 8));
}
inline Floats lanes(const int8_t* x) {
    auto half = [](const int8_t* from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
    };
    return joined(half(x), half(x + 8));
}
#else
inline Floats lanes(const bfloat16* x) {
    return (Floats)(__builtin_convertvector(raw<Halves>(x), Words) << 16);
}
inline Floats lanes(const int8_t* x) {
    return __builtin_convertvector(__builtin_convertvector(raw<Bytes>(x), Integers), Floats);
}
#endif

inline float one(const float* x) { return *x; }
inline float one(const int8_t* x) { return *x; }
inline float one(const bfloat16* x) {
    uint32_t bits = uint32_t(x->bits) << 16;
    return raw<float>(&bits);
}

inline void put(float* to, float value) { *to = value; }
inline void put(bfloat16* to, float value) {  // To the nearest, and of two to the even one.
    uint32_t bits = raw<uint32_t>(&value);
    if (std::isnan(value)) bits |= 0x400000;
    else bits += 0x7fff + ((bits >> 16) & 1);
    to->bits = bits >> 16;
}

inline void put(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline float sum(Floats x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return x[0];
}

// The sums of LANES vectors, each in its lane: half as many additions at every level.
inline Floats sums(const Floats* x) {
    constexpr int place[LANES] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
    Floats y[LANES];
    for (int i = 0; i < LANES; i++) y[place[i]] = x[i];
    for (int i = 0; i < 8; i++)
        y[i] = __builtin_shufflevector(y[i], y[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(y[i], y[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        y[i] = __builtin_shufflevector(y[i], y[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(y[i], y[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        y[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(y[i], y[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(y[0], y[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(y[0], y[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// Cephes: 2^n times a polynomial for what is left of the argument; to 2 units in the last place.
inline Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x > 88.0f ? Floats{} + 88.0f : x;
    Integers n = __builtin_convertvector(x * 1.44269504f + (x < 0 ? Floats{} - 0.5f : Floats{} + 0.5f), Integers);
    Floats whole = __builtin_convertvector(n, Floats);
    x -= whole * 0.693359375f;
    x += whole * 2.12194440e-4f;
    Floats y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return y * (Floats)((n + 127) << 23);
}

template <class T>
inline float dot(const T* a, const float* b, int64_t size) {
    Floats total{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) total += lanes(a + i) * lanes(b + i);
    float result = sum(total);
    for (; i < size; i++) result += one(a + i) * b[i];
    return result;
}

template <class T>
inline void add_scaled(float* to, float factor, const T* x, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        Floats now = lanes(to + i) + factor * lanes(x + i);
        std::memcpy(to + i, &now, sizeof now);
    }
    for (; i < size; i++) to[i] += factor * one(x + i);
}

}  // namespace
