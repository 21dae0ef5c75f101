// Few rows times several weight matrices, on a CPU. Bound by memory: each weight is read once, in order, by one thread.
// In front of this text stand vectors.h, T, and ROWS, the number of rows.
namespace {

struct Product { const T* w; const T* bias; T* out; int64_t columns; };

// out[m * columns] = x[m] . w + bias, one row w of k weights.
inline void one_column(const float* x, const T* w, const T* bias, T* out, int64_t columns, int64_t k) {
  vec acc[ROWS][2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= k; i += 2 * LANES)
    for (int u = 0; u < 2; ++u) {
      const vec y = load(w + i + u * LANES);
      for (int m = 0; m < ROWS; ++m) acc[m][u] += y * load(x + m * k + i + u * LANES);
    }
  for (int m = 0; m < ROWS; ++m) {
    float total = sum(acc[m][0] + acc[m][1]);
    for (int64_t t = i; t < k; ++t) total += x[m * k + t] * scalar(w + t);
    put(out + m * columns, total + (bias ? scalar(bias) : 0.0f));
  }
}

}  // namespace

// For every product: out [ROWS, columns] = x [ROWS, k] w' + bias, with w [columns, k] contiguous and bias [columns] or null.
extern "C" void linears(const T* x, const Product* products, int64_t count, int64_t k, int64_t threads) {
  std::vector<float> rows(ROWS * k);
  for (int64_t i = 0; i < ROWS * k; ++i) rows[i] = scalar(x + i);
  int64_t total = 0;
  for (int64_t p = 0; p < count; ++p) total += products[p].columns;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    int64_t from = total * part / threads, to = total * (part + 1) / threads;
    for (int64_t p = 0; p < count && to > 0; ++p) {
      const Product& it = products[p];
      for (int64_t c = std::max<int64_t>(from, 0); c < std::min(to, it.columns); ++c)
        one_column(rows.data(), it.w + c * k, it.bias ? it.bias + c : nullptr, it.out + c, it.columns, k);
      from -= it.columns;
      to -= it.columns;
    }
  }
}
