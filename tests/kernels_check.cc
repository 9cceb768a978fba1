// Kernels against plain loops, without ONNX Runtime, so that an emulator can run them.
// Checks the scalar kernels and those that -DOTHER names; prints the largest relative error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "kernels.h"
using namespace moecc;

static double worst = 0;

static void check(const Kernels& k, int64_t v, bool signs, int64_t inputs) {
  const int64_t rows = 3, columns = 2, width = columns * BLOCK, height = rows * BLOCK;
  std::vector<uint8_t> codes(width * height / v), bits(width * height / 8);
  std::vector<int8_t> book(256 * v);
  for (auto& c : codes) c = rand();
  for (auto& b : bits) b = rand();
  for (auto& b : book) b = signs ? rand() % 128 : rand() % 255 - 127;
  const Coded m{codes.data(), signs ? bits.data() : nullptr, book.data(), v, rows, columns};
  std::vector<float> x(inputs * width), y(inputs * height);
  for (auto& f : x) f = rand() / float(RAND_MAX) - 0.5f;
  std::vector<const float*> in;
  std::vector<const void*> ready;
  std::vector<float*> out;
  std::vector<std::vector<uint8_t>> prepared(inputs);
  for (int64_t i = 0; i < inputs; i++) {
    in.push_back(&x[i * width]);
    out.push_back(&y[i * height]);
    ready.push_back(in[i]);
    if (!k.prepare) continue;
    prepared[i].resize(k.prepared_bytes(columns));
    k.prepare(in[i], columns, prepared[i].data());
    ready[i] = prepared[i].data();
  }
  for (int lookup = 0; lookup < (signs ? 1 : 2); lookup++) {
    if (lookup) k.lookup(m, in.data(), out.data(), inputs, 0, columns);
    else k.multiply(m, ready.data(), out.data(), inputs, 0, rows);
    double error = 0, norm = 0;
    for (int64_t i = 0; i < inputs; i++)
      for (int64_t n = 0; n < height; n++) {
        double sum = 0;
        for (int64_t c = 0; c < width; c++) {
          const int64_t row = n % BLOCK, column = c % BLOCK;
          double w = book[m.block(c / BLOCK, n / BLOCK)[column / v * BLOCK + row] * v + c % v];
          if (signs) {
            const uint8_t* four = m.sign_block(c / BLOCK, n / BLOCK) + column / 4 * 32;
            if (four[row % 32] >> (row / 32 * 4 + column % 4) & 1) w = -1 - w;
          }
          sum += w * in[i][c];
        }
        error += (out[i][n] - sum) * (out[i][n] - sum);
        norm += sum * sum;
      }
    worst = std::fmax(worst, std::sqrt(error / norm));
  }
}

static bool halves(const Kernels& k) {
  std::vector<uint16_t> h(65536), back(65536), plain(65536);
  std::vector<float> f(65536), g(65536);
  for (int i = 0; i < 65536; i++) h[i] = i;
  k.from_half(h.data(), f.data(), 65536);
  SCALAR_KERNELS.from_half(h.data(), g.data(), 65536);
  for (int i = 0; i < 65536; i++)
    if (std::isnan(f[i]) ? !std::isnan(g[i]) : f[i] != g[i]) return false;
  for (int shift : {0, 1, 0x7ff, 0x800, 0x801, 0xfff, 0x1000, 0x1001, 0x1fff}) {
    for (int i = 0; i < 65536; i++) {
      uint32_t bits;
      memcpy(&bits, &g[i], 4);
      bits += shift;
      memcpy(&f[i], &bits, 4);
    }
    k.to_half(f.data(), back.data(), 65536);
    SCALAR_KERNELS.to_half(f.data(), plain.data(), 65536);
    for (int i = 0; i < 65536; i++) {
      if (shift == 0 && !std::isnan(f[i]) && plain[i] != h[i]) return false;
      if (!std::isnan(f[i]) && back[i] != plain[i]) return false;
    }
  }
  return true;
}

static void attention(const Kernels& k, int64_t queries, int64_t keys, int64_t width) {
  std::vector<float> q(queries * width), key(keys * width), s(queries * keys);
  std::vector<float> y(queries * width, 1.0f);
  std::vector<uint8_t> mask(keys);
  for (auto& f : q) f = rand() / float(RAND_MAX) - 0.5f;
  for (auto& f : key) f = rand() / float(RAND_MAX) - 0.5f;
  for (auto& m : mask) m = rand() % 3 > 0;
  k.scores(q.data(), queries, key.data(), keys, width, s.data(), keys);
  for (int64_t i = 0; i < queries; i++) k.softmax(&s[i * keys], mask.data(), keys);
  k.mix(s.data(), keys, queries, key.data(), keys, width, y.data());
  double error = 0, norm = 0;
  for (int64_t i = 0; i < queries; i++) {
    std::vector<double> e(keys);
    double total = 1e-300;
    for (int64_t t = 0; t < keys; t++) {
      for (int64_t j = 0; j < width; j++) e[t] += double(q[i * width + j]) * key[t * width + j];
      total += e[t] = mask[t] ? std::exp(e[t]) : 0;
    }
    for (int64_t j = 0; j < width; j++) {
      double sum = 1;
      for (int64_t t = 0; t < keys; t++) sum += e[t] / total * key[t * width + j];
      error += (y[i * width + j] - sum) * (y[i * width + j] - sum);
      norm += sum * sum;
    }
  }
  worst = std::fmax(worst, std::sqrt(error / norm));
}

int main() {
  for (const Kernels* k : {&SCALAR_KERNELS, &OTHER}) {
    for (int64_t inputs : {1, 2, 3, 5, 8}) {
      check(*k, 4, false, inputs);
      check(*k, 2, false, inputs);
      check(*k, 4, true, inputs);
    }
    for (int64_t width : {1, 5, 16, 64, 100}) {
      attention(*k, 1, 3, width);
      attention(*k, 7, 66, width);
    }
    if (!halves(*k)) return puts("halves differ"), 1;
  }
  printf("%g\n", worst);
}
