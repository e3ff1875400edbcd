// A straightforward C++ version of the row-span idea, to compare the kernels with: K planar channels, forward by bands of
// rows, backward one Gaussian at a time. gs2d does not use it.
//   g++ -O3 -march=native -ffast-math -std=c++17 -shared -fPIC -pthread baseline.cpp -o baseline.so
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
static const float CUT = 11.082527f;
static inline float exp_poly(float x) {  // exp(x), x <= 0
    float z = x * 1.44269504f, n = std::nearbyintf(z), f = z - n;
    float p = 1.0f + f * (0.6931472f + f * (0.24022651f + f * (0.05550347f + f * (0.009618129f + f * 0.0013333558f))));
    int32_t bits; std::memcpy(&bits, &p, 4); bits += (int32_t)n << 23; std::memcpy(&p, &bits, 4);
    return p;
}
static inline void span(float mx, float a, float b, float c, float dy, int width, int& lo, int& hi) {
    float disc = (b * dy) * (b * dy) - a * (c * dy * dy - CUT);
    if (disc < 0) { lo = hi = 0; return; }
    float root = std::sqrt(disc), mid = mx - b * dy / a, half = root / a;
    lo = std::max(0, (int)std::floor(mid - half - 0.5f)), hi = std::min(width, (int)std::ceil(mid + half + 0.5f));
}
static inline void rows(float my, float a, float b, float c, int top, int end, int& y0, int& y1) {
    float reach = std::sqrt(CUT * a / (a * c - b * b));
    y0 = std::max(top, (int)std::floor(my - reach)), y1 = std::min(end, (int)std::ceil(my + reach));
}
template <class F> static void parallel(int threads, int n, F f) {
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) pool.emplace_back([=] { f((int64_t)n * t / threads, (int64_t)n * (t + 1) / threads); });
    f(0, n / threads);
    for (auto& t : pool) t.join();
}
extern "C" void splat_forward(int n, int k, int height, int width, const float* means, const float* conics, const float* values, float* out, int threads) {
    parallel(threads, height, [=](int top, int end) {
        for (int c = 0; c < k; ++c) std::fill(out + ((size_t)c * height + top) * width, out + ((size_t)c * height + end) * width, 0.f);
        for (int i = 0; i < n; ++i) {
            float mx = means[2 * i], my = means[2 * i + 1], a = conics[3 * i], b = conics[3 * i + 1], c = conics[3 * i + 2];
            int y0, y1, lo, hi; rows(my, a, b, c, top, end, y0, y1);
            float w[1 << 14];
            for (int y = y0; y < y1; ++y) {
                float dy = y + 0.5f - my, B = 2 * b * dy, C = c * dy * dy;
                span(mx, a, b, c, dy, width, lo, hi);
                for (int x = lo; x < hi; ++x) { float dx = x + 0.5f - mx, q = dx * (a * dx + B) + C; float e = exp_poly(-0.5f * q); w[x - lo] = q <= CUT ? e : 0.f; }
                for (int ch = 0; ch < k; ++ch) { float v = values[(size_t)i * k + ch]; float* o = out + ((size_t)ch * height + y) * width; for (int x = lo; x < hi; ++x) o[x] += w[x - lo] * v; }
            }
        }
    });
}
extern "C" void splat_backward(int n, int k, int height, int width, const float* means, const float* conics, const float* values, const float* grad, float* out, int threads) {
    parallel(threads, n, [=](int start, int stop) {
        for (int i = start; i < stop; ++i) {
            float mx = means[2 * i], my = means[2 * i + 1], a = conics[3 * i], b = conics[3 * i + 1], c = conics[3 * i + 2];
            int y0, y1, lo, hi; rows(my, a, b, c, 0, height, y0, y1);
            float m = 0, mdx = 0, mdy = 0, mxx = 0, mxy = 0, myy = 0, s[8] = {0}, w[1 << 14], h[1 << 14];
            for (int y = y0; y < y1; ++y) {
                float dy = y + 0.5f - my, B = 2 * b * dy, C = c * dy * dy;
                span(mx, a, b, c, dy, width, lo, hi);
                for (int x = lo; x < hi; ++x) { float dx = x + 0.5f - mx, q = dx * (a * dx + B) + C; float e = exp_poly(-0.5f * q); w[x - lo] = q <= CUT ? e : 0.f; h[x - lo] = 0; }
                for (int ch = 0; ch < k; ++ch) {
                    float v = values[(size_t)i * k + ch], t = 0; const float* g = grad + ((size_t)ch * height + y) * width;
                    for (int x = lo; x < hi; ++x) { float e = w[x - lo] * g[x]; t += e; h[x - lo] += v * e; }
                    s[ch] += t;
                }
                float r0 = 0, r1 = 0, r2 = 0;
                for (int x = lo; x < hi; ++x) { float dx = x + 0.5f - mx, e = h[x - lo]; r0 += e; r1 += e * dx; r2 += e * dx * dx; }
                m += r0, mdx += r1, mxx += r2, mdy += r0 * dy, mxy += r1 * dy, myy += r0 * dy * dy;
            }
            float* o = out + (size_t)i * (6 + k);
            o[0] = m, o[1] = mdx, o[2] = mdy, o[3] = mxx, o[4] = mxy, o[5] = myy;
            for (int ch = 0; ch < k; ++ch) o[6 + ch] = s[ch];
        }
    });
}
