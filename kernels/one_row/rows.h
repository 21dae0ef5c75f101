// Parts of kernels that read cached keys for one query row a head: products with keys, weighted sums of values, and how many threads pay.
// In front of this text stand vectors.h, T, WIDTH and WIDTH_V (channels of keys and of values). R heads read the same keys together.
#include <atomic>
#include <thread>

namespace {

constexpr int BLOCK = 128;          // keys whose weights are worked out together
constexpr float LOWEST = -3.0e38f;   // stands for the largest logit while every key was hidden

// Into the second cache: what is asked for in the first one waits for its few places there, and takes half as long again.
template <int N> inline void fetch(const T* row) {
  for (int i = 0; i < N; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 0, 2);
}

// out[r * step + j] = q[r] . k[at[j] * row] for eight keys and R queries: each key is read once.
template <int R> inline void dots(const float* q, const T* k, const int64_t* at, int64_t row, float* out, int64_t step) {
  constexpr int WHOLE = WIDTH / LANES * LANES;
  vec part[R][LANES];
  for (int j = 0; j < LANES; ++j) {
    const T* key = k + at[j] * row;
    vec acc[R] = {};
    for (int i = 0; i < WHOLE; i += LANES) {
      const vec x = load(key + i);
      for (int r = 0; r < R; ++r) acc[r] += x * load(q + r * WIDTH + i);
    }
    for (int r = 0; r < R; ++r) part[r][j] = acc[r];
  }
  for (int r = 0; r < R; ++r) {
    vec found = sums(part[r]);
    for (int i = WHOLE; i < WIDTH; ++i)
      for (int j = 0; j < LANES; ++j) found[j] += q[r * WIDTH + i] * scalar(k + at[j] * row + i);
    std::memcpy(out + r * step, &found, sizeof found);
  }
}

// acc[r] = acc[r] * shrink[r] + sum over j of w[r][j] * v[at[j] * row], PARTS vectors of all rows from channel c on.
template <int R, int PARTS>
inline void weigh(float* acc, const float* shrink, const float (*w)[BLOCK], const T* v, const int64_t* at, int64_t row, int count, int c) {
  vec held[R][PARTS];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) held[r][i] = load(acc + r * WIDTH_V + c + i * LANES) * shrink[r];
  for (int j = 0; j < count; ++j) {
    const T* from = v + at[j] * row + c;
    vec x[PARTS];
    for (int i = 0; i < PARTS; ++i) x[i] = load(from + i * LANES);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < PARTS; ++i) held[r][i] += x[i] * w[r][j];
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < PARTS; ++i) std::memcpy(acc + r * WIDTH_V + c + i * LANES, &held[r][i], sizeof(vec));
}

template <int R>
inline void weigh_all(float* acc, const float* shrink, const float (*w)[BLOCK], const T* v, const int64_t* at, int64_t row, int count) {
  constexpr int PARTS = R == 1 ? 8 : R <= 3 ? 4 : R <= 6 ? 2 : 1;  // as many sums as registers hold
  int c = 0;
  for (; c + PARTS * LANES <= WIDTH_V; c += PARTS * LANES) weigh<R, PARTS>(acc, shrink, w, v, at, row, count, c);
  for (; c + LANES <= WIDTH_V; c += LANES) weigh<R, 1>(acc, shrink, w, v, at, row, count, c);
  for (; c < WIDTH_V; ++c)
    for (int r = 0; r < R; ++r) {
      float x = acc[r * WIDTH_V + c] * shrink[r];
      for (int j = 0; j < count; ++j) x += w[r][j] * scalar(v + at[j] * row + c);
      acc[r * WIDTH_V + c] = x;
    }
}

struct Keys {  // which keys a unit reads: all `keys` of them, or `count` that `index` names (keys, or pages of `page` keys)
  const int64_t* index; int64_t count, page, keys;
  int fill(int64_t from, int64_t to, int64_t* at) const {
    int n = 0;
    for (int64_t c = from; c < to && (!index || page == 1); ++c) {
      const int64_t key = index ? index[c] : c;
      if (key < keys) at[n++] = key;
    }
    for (int64_t c = from; c < to && index && page > 1;) {  // what is left of a page at a time
      const int64_t within = c % page, first = index[c / page] * page + within, run = std::min(page - within, to - c);
      for (int64_t key = first; key < std::min(first + run, keys); ++key) at[n++] = key;
      c += run;
    }
    return n;
  }
};

inline void spin(double seconds) { for (const double end = omp_get_wtime() + seconds; omp_get_wtime() < end;) { } }

// What it costs to share work with a second thread that slept since the last call: seconds, the median of some. Both have something to do
// here, since a thread that is woken may first have to wait for the processor of the one that woke it.
double wake_seconds() {
  constexpr double WORK = 5e-5;
  double found[9];
  for (double& seconds : found) {
    spin(2 * WORK);
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(2)
    spin(WORK);
    seconds = omp_get_wtime() - start - WORK;
  }
  std::nth_element(found, found + 4, found + 9);
  return found[4];
}

// How many threads are worth waking to read so many bytes, at 10 GB/s each: where threads sleep between calls, waking is dear.
inline int64_t worth(int64_t bytes, int64_t threads) {
  static const double wake = wake_seconds();
  return bytes * 1e-10 * (threads - 1) / threads > wake ? threads : 1;
}

// Tasks that threads take in any order; who finds none left waits for the others awake, since the next ones come at once.
struct Work {
  int64_t total;
  std::atomic<int64_t> next{0}, done{0};
  explicit Work(int64_t count) : total(count) {}
  template <typename F> void run(F task) {
    for (int64_t i = next++; i < total; i = next++) { task(i); done.fetch_add(1, std::memory_order_release); }
    for (int turns = 0; done.load(std::memory_order_acquire) < total; turns += turns < 10000)
      if (turns == 10000) std::this_thread::yield();  // somebody else needs this processor
  }
};

inline void to_float(const T* q, float scale, float* out, int width) { for (int i = 0; i < width; ++i) out[i] = scalar(q + i) * scale; }

// One unit over candidates [from, to): largest logits, sums of exponentials, weighted sums of values.
template <int R>
void attend_part(const float* q, const T* k, const T* v, const uint8_t* visible, const float* bias, int64_t mask_step, Keys keys, int64_t from, int64_t to,
                 int64_t step_k, int64_t step_v, float* top, float* mass, float* acc) {
  int64_t at[BLOCK];
  alignas(32) float w[R][BLOCK];
  for (int r = 0; r < R; ++r) { top[r] = LOWEST; mass[r] = 0; std::fill(acc + r * WIDTH_V, acc + (r + 1) * WIDTH_V, 0.0f); }
  for (int64_t start = from; start < to; start += BLOCK) {
    const int count = keys.fill(start, std::min(start + BLOCK, to), at);
    if (!count) continue;
    for (int j = count; j < BLOCK; ++j) at[j] = at[count - 1];  // read twice, weighed not
    const int whole = (count + LANES - 1) / LANES * LANES;
    for (int j = 0; j < whole; j += LANES) {
      if (keys.index) {  // rows that lie apart: those that come next, and the values that will be wanted
        for (int i = j; i < j + LANES; ++i) {
          fetch<WIDTH>(k + at[std::min(i + LANES, BLOCK - 1)] * step_k);
          fetch<WIDTH_V>(v + at[i] * step_v);
        }
      }
      dots<R>(q, k, at + j, step_k, &w[0][j], BLOCK);
    }
    float shrink[R];
    for (int r = 0; r < R; ++r) {
      if (visible) for (int j = 0; j < count; ++j) w[r][j] = visible[r * mask_step + at[j]] ? w[r][j] : -INFINITY;
      if (bias) for (int j = 0; j < count; ++j) w[r][j] += bias[r * mask_step + at[j]];
      for (int j = count; j < whole; ++j) w[r][j] = -INFINITY;
      float most = top[r];
      for (int j = 0; j < count; ++j) most = std::max(most, w[r][j]);
      shrink[r] = exp_negative(vec{} + (top[r] - most))[0];
      vec total{};
      for (int j = 0; j < whole; j += LANES) {
        vec x = exp_negative(load(&w[r][j]) - most);
        std::memcpy(&w[r][j], &x, sizeof x);
        total += x;
      }
      top[r] = most;
      mass[r] = mass[r] * shrink[r] + sum(total);
    }
    weigh_all<R>(acc, shrink, w, v, at, step_v, count);
  }
}

struct Sizes { int64_t batch, heads, groups, keys, threads; };
struct Steps { int64_t batch, head, row; };

// Attention of one query row a head, in parts that threads may take in any order: a unit (R heads) over some of its candidates each.
template <int R>
struct Attention {
  const T *q, *k, *v; const uint8_t* visible; const float* bias; const int64_t* index;
  const Sizes* sizes; const Steps *of_k, *of_v, *of_mask; int64_t choices, count, page; float scale;
  static constexpr int64_t HELD = R * (WIDTH_V + 2);
  int64_t size = 0, parts = 0;
  std::vector<float> found{};  // of each part R largest logits, R sums of exponentials and R weighted sums of values

  int64_t units() const { return sizes->batch * (sizes->heads / R); }
  int64_t candidates() const { return index ? count * page : sizes->keys; }
  int64_t bytes() const { return units() * candidates() * (WIDTH + WIDTH_V) * sizeof(T); }

  int64_t split(int64_t threads) {  // how many parts there are
    const int64_t wanted = std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, units()));
    size = std::max<int64_t>(4 * BLOCK, (candidates() + wanted * BLOCK - 1) / (wanted * BLOCK) * BLOCK);
    parts = std::max<int64_t>(1, (candidates() + size - 1) / size);
    found.resize(units() * parts * HELD);
    return units() * parts;
  }

  void part(int64_t item) {
    const int64_t from = item % parts * size, of_batch = sizes->heads / R, unit = item / parts % of_batch, b = item / parts / of_batch;
    const int64_t group = unit * R / (sizes->heads / sizes->groups), choice = choices ? unit * choices / of_batch : 0;
    const int64_t hidden = b * of_mask->batch + unit * R * of_mask->head;
    float rows[R * WIDTH], *to = found.data() + item * HELD;
    for (int r = 0; r < R; ++r) to_float(q + (b * sizes->heads + unit * R + r) * WIDTH, scale, rows + r * WIDTH, WIDTH);
    Keys chosen{index ? index + (b * choices + choice) * count : nullptr, count, page, sizes->keys};
    attend_part<R>(rows, k + b * of_k->batch + group * of_k->head, v + b * of_v->batch + group * of_v->head, visible ? visible + hidden : nullptr,
                   bias ? bias + hidden : nullptr, of_mask->head, chosen, from, std::min(candidates(), from + size), of_k->row, of_v->row, to,
                   to + R, to + 2 * R);
  }

  void join(int64_t unit, T* out) const {
    for (int r = 0; r < R; ++r) {
      const float* from = found.data() + unit * parts * HELD;
      float top = LOWEST, mass = 0, acc[WIDTH_V] = {};
      for (int64_t p = 0; p < parts; ++p) top = std::max(top, from[p * HELD + r]);
      for (int64_t p = 0; p < parts; ++p) {
        const float share = std::exp(from[p * HELD + r] - top);
        mass += share * from[p * HELD + R + r];
        for (int c = 0; c < WIDTH_V; ++c) acc[c] += share * from[p * HELD + 2 * R + r * WIDTH_V + c];
      }
      for (int c = 0; c < WIDTH_V; ++c) put(out + (unit * R + r) * WIDTH_V + c, mass > 0 || mass != mass ? acc[c] / mass : 0.0f);
    }
  }
};

}  // namespace
