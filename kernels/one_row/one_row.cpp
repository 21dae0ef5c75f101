// One query row a head over cached keys, on a CPU: attention, scores of keys, bounds of pages, and the best of them.
// In front of this text stand vectors.h, T, WIDTH and WIDTH_V (channels of keys and of values) and ROWS (heads that read the same keys).
// Heads are taken ROWS at a time ("units"), so that each key is read once for all of them.
namespace {

constexpr int BLOCK = 128;          // keys whose weights are worked out together
constexpr float LOWEST = -3.0e38f;   // stands for the largest logit while every key was hidden

template <int N> inline void fetch(const T* row) {
  for (int i = 0; i < N; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// out[r * step + j] = q[r] . k[at[j] * row] for eight keys and ROWS queries: each key is read once.
inline void dots(const float* q, const T* k, const int64_t* at, int64_t row, float* out, int64_t step) {
  constexpr int WHOLE = WIDTH / LANES * LANES;
  vec part[ROWS][LANES];
  for (int j = 0; j < LANES; ++j) {
    const T* key = k + at[j] * row;
    vec acc[ROWS] = {};
    for (int i = 0; i < WHOLE; i += LANES) {
      const vec x = load(key + i);
      for (int r = 0; r < ROWS; ++r) acc[r] += x * load(q + r * WIDTH + i);
    }
    for (int r = 0; r < ROWS; ++r) part[r][j] = acc[r];
  }
  for (int r = 0; r < ROWS; ++r) {
    vec found = sums(part[r]);
    for (int i = WHOLE; i < WIDTH; ++i)
      for (int j = 0; j < LANES; ++j) found[j] += q[r * WIDTH + i] * scalar(k + at[j] * row + i);
    std::memcpy(out + r * step, &found, sizeof found);
  }
}

// acc[r] = acc[r] * shrink[r] + sum over j of w[r][j] * v[at[j] * row], PARTS vectors of all rows from channel c on.
template <int PARTS>
inline void weigh(float* acc, const float* shrink, const float (*w)[BLOCK], const T* v, const int64_t* at, int64_t row, int count, int c) {
  vec held[ROWS][PARTS];
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < PARTS; ++i) held[r][i] = load(acc + r * WIDTH_V + c + i * LANES) * shrink[r];
  for (int j = 0; j < count; ++j) {
    const T* from = v + at[j] * row + c;
    vec x[PARTS];
    for (int i = 0; i < PARTS; ++i) x[i] = load(from + i * LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < PARTS; ++i) held[r][i] += x[i] * w[r][j];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < PARTS; ++i) std::memcpy(acc + r * WIDTH_V + c + i * LANES, &held[r][i], sizeof(vec));
}

inline void weigh_all(float* acc, const float* shrink, const float (*w)[BLOCK], const T* v, const int64_t* at, int64_t row, int count) {
  constexpr int PARTS = ROWS == 1 ? 8 : ROWS <= 3 ? 4 : ROWS <= 6 ? 2 : 1;  // as many sums as registers hold
  int c = 0;
  for (; c + PARTS * LANES <= WIDTH_V; c += PARTS * LANES) weigh<PARTS>(acc, shrink, w, v, at, row, count, c);
  for (; c + LANES <= WIDTH_V; c += LANES) weigh<1>(acc, shrink, w, v, at, row, count, c);
  for (; c < WIDTH_V; ++c)
    for (int r = 0; r < ROWS; ++r) {
      float x = acc[r * WIDTH_V + c] * shrink[r];
      for (int j = 0; j < count; ++j) x += w[r][j] * scalar(v + at[j] * row + c);
      acc[r * WIDTH_V + c] = x;
    }
}

// The largest q.k of any key between the bounds.
inline float bound(const float* q, const T* low, const T* high) {
  constexpr int WHOLE = WIDTH / LANES * LANES;
  vec total{};
  for (int i = 0; i < WHOLE; i += LANES) {
    vec x = load(q + i), side = x > 0.0f ? load(high + i) : load(low + i);
    side = side < INFINITY ? (side > -INFINITY ? side : vec{}) : vec{};
    total += x * side;
  }
  float found = sum(total);
  for (int i = WHOLE; i < WIDTH; ++i) {
    const float side = q[i] > 0 ? scalar(high + i) : scalar(low + i);
    if (std::isfinite(side)) found += q[i] * side;
  }
  return found;
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

inline void to_float(const T* q, float scale, float* out, int width) { for (int i = 0; i < width; ++i) out[i] = scalar(q + i) * scale; }

// One unit over candidates [from, to): largest logits, sums of exponentials, weighted sums of values.
void attend_part(const float* q, const T* k, const T* v, const uint8_t* visible, const float* bias, int64_t mask_step, Keys keys, int64_t from, int64_t to,
                 int64_t step_k, int64_t step_v, float* top, float* mass, float* acc) {
  int64_t at[BLOCK];
  alignas(32) float w[ROWS][BLOCK];
  for (int r = 0; r < ROWS; ++r) { top[r] = LOWEST; mass[r] = 0; std::fill(acc + r * WIDTH_V, acc + (r + 1) * WIDTH_V, 0.0f); }
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
      dots(q, k, at + j, step_k, &w[0][j], BLOCK);
    }
    float shrink[ROWS];
    for (int r = 0; r < ROWS; ++r) {
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
    weigh_all(acc, shrink, w, v, at, step_v, count);
  }
}

}  // namespace

struct Sizes { int64_t batch, heads, groups, keys, threads; };
struct Steps { int64_t batch, head, row; };

// out [B, H, WIDTH_V] = softmax(q k' scale + mask) v over the chosen keys; rows that see nothing are 0. index [B, choices, count] or null.
extern "C" void attend(const T* q, const T* k, const T* v, T* out, const uint8_t* visible, const float* bias, const int64_t* index,
                       const Sizes* sizes, const Steps* of_k, const Steps* of_v, const Steps* of_mask, int64_t choices, int64_t count, int64_t page, float scale) {
  const int64_t batch = sizes->batch, heads = sizes->heads, groups = sizes->groups, keys = sizes->keys;
  const int64_t units = heads / ROWS, total = index ? count * page : keys;
  const int64_t threads = worth(batch * units * total * (WIDTH + WIDTH_V) * sizeof(T), sizes->threads);
  const int64_t wanted = std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, batch * units));
  const int64_t size = std::max<int64_t>(4 * BLOCK, (total + wanted * BLOCK - 1) / (wanted * BLOCK) * BLOCK);
  const int64_t parts = std::max<int64_t>(1, (total + size - 1) / size), held = ROWS * (WIDTH_V + 2);
  std::vector<float> scratch(batch * units * parts * held);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < batch * units * parts; ++item) {
    const int64_t part = item % parts, unit = item / parts % units, b = item / parts / units;
    const int64_t group = unit * ROWS / (heads / groups), choice = choices ? unit * choices / units : 0;
    const int64_t hidden = b * of_mask->batch + unit * ROWS * of_mask->head;
    float rows[ROWS * WIDTH];
    for (int r = 0; r < ROWS; ++r) to_float(q + ((b * heads) + unit * ROWS + r) * WIDTH, scale, rows + r * WIDTH, WIDTH);
    float* to = scratch.data() + item * held;
    Keys chosen{index ? index + (b * choices + choice) * count : nullptr, count, page, keys};
    attend_part(rows, k + b * of_k->batch + group * of_k->head, v + b * of_v->batch + group * of_v->head,
                visible ? visible + hidden : nullptr, bias ? bias + hidden : nullptr, of_mask->head, chosen,
                part * size, std::min(total, (part + 1) * size), of_k->row, of_v->row, to, to + ROWS, to + 2 * ROWS);
  }
  for (int64_t u = 0; u < batch * units; ++u)
    for (int r = 0; r < ROWS; ++r) {
      const float* from = scratch.data() + u * parts * held;
      float top = LOWEST, mass = 0, acc[WIDTH_V] = {};
      for (int64_t p = 0; p < parts; ++p) top = std::max(top, from[p * held + r]);
      for (int64_t p = 0; p < parts; ++p) {
        const float share = std::exp(from[p * held + r] - top);
        mass += share * from[p * held + ROWS + r];
        for (int c = 0; c < WIDTH_V; ++c) acc[c] += share * from[p * held + 2 * ROWS + r * WIDTH_V + c];
      }
      for (int c = 0; c < WIDTH_V; ++c) put(out + (u * ROWS + r) * WIDTH_V + c, mass > 0 || mass != mass ? acc[c] / mass : 0.0f);
    }
}

// One unit's logits of keys [from, to); with `vote` their exponentials, each row's against its own largest logit, which `top` keeps.
inline void score_part(const float* q, const T* k, int64_t step, const uint8_t* visible, int64_t from, int64_t to, bool vote, float* x,
                       int64_t room, float* top, float* mass, int64_t parts) {
  for (int64_t j = from; j < to; j += LANES) {
    int64_t at[LANES];
    for (int i = 0; i < LANES; ++i) at[i] = std::min(j + i, to - 1);
    dots(q, k, at, step, x + j, room);
    for (int i = 0; i < LANES; ++i)
      if (j + i >= to || (vote && visible && !visible[j + i]))
        for (int r = 0; r < ROWS; ++r) x[r * room + j + i] = -INFINITY;
  }
  for (int r = 0; vote && r < ROWS; ++r) {
    float* row = x + r * room;
    float most = LOWEST;
    for (int64_t j = from; j < to; ++j) most = std::max(most, row[j]);
    vec total{};
    for (int64_t j = from; j < to; j += LANES) {
      const vec w = exp_negative(load(row + j) - most);
      std::memcpy(row + j, &w, sizeof w);
      total += w;
    }
    top[r * parts] = most;
    mass[r * parts] = sum(total);
  }
}

// out [B, choices, N]: the mean over each choice's heads of q.k scale, or (vote) of their softmax over the visible keys; 0 where skip [B].
extern "C" void score_keys(const T* q, const T* k, float* out, const uint8_t* visible, const Sizes* sizes, const Steps* of_k, int64_t mask_step,
                           int64_t choices, int64_t vote, float scale, const uint8_t* skip) {
  const int64_t batch = sizes->batch, heads = sizes->heads, groups = sizes->groups, keys = sizes->keys;
  const int64_t units = heads / ROWS, chunk = 4 * BLOCK, parts = (keys + chunk - 1) / chunk, share = heads / choices;
  const int64_t room = parts * chunk, awake = worth(batch * groups * keys * WIDTH * sizeof(T), sizes->threads);
  static thread_local std::vector<float> kept;  // not allocated anew for every layer
  kept.resize(std::max<size_t>(kept.size(), batch * heads * room));
  float* const logits = kept.data();
  std::vector<float> top(batch * heads * parts), mass(batch * heads * parts, 1.0f);
#pragma omp parallel for collapse(2) num_threads(awake)
  for (int64_t unit = 0; unit < batch * units; ++unit)
    for (int64_t c = 0; c < parts; ++c) {
      const int64_t b = unit / units, head = unit % units * ROWS, row = b * heads + head;
      if (skip && skip[b]) continue;
      float rows[ROWS * WIDTH];
      for (int r = 0; r < ROWS; ++r) to_float(q + (row + r) * WIDTH, scale, rows + r * WIDTH, WIDTH);
      score_part(rows, k + b * of_k->batch + head / (heads / groups) * of_k->head, of_k->row, visible ? visible + b * mask_step : nullptr,
                 c * chunk, std::min(keys, (c + 1) * chunk), vote, logits + row * room, room, &top[row * parts + c], &mass[row * parts + c], parts);
    }
  for (int64_t row = 0; row < batch * heads; ++row) {
    float* const to = out + row / share * keys;
    float most = LOWEST, total = 0;
    for (int64_t c = 0; c < parts; ++c) most = std::max(most, top[row * parts + c]);
    for (int64_t c = 0; c < parts; ++c) total += mass[row * parts + c] * std::exp(top[row * parts + c] - most);
    if (row % share == 0) std::fill(to, to + keys, 0.0f);
    if (skip && skip[row / heads]) continue;
    for (int64_t c = 0; c < parts; ++c) {
      const float factor = (vote ? std::exp(top[row * parts + c] - most) / total : 1.0f) / share;
      for (int64_t j = c * chunk; j < std::min(keys, (c + 1) * chunk); ++j) to[j] += logits[row * room + j] * factor;
    }
  }
}

// One unit's bounds of pages [from, to), x [ROWS, room]: what is positive in q against `high`, what is negative against `low`.
void bound_part(const float* q, const T* low, const T* high, int64_t step_low, int64_t step_high, int64_t from, int64_t to, float* x, int64_t room) {
  float above[ROWS * WIDTH], below[ROWS * WIDTH], less[ROWS * LANES];
  for (int i = 0; i < ROWS * WIDTH; ++i) { above[i] = std::max(q[i], 0.0f); below[i] = std::min(q[i], 0.0f); }
  for (int64_t p = from; p < to; p += LANES) {
    int64_t at[LANES];
    float more[ROWS * LANES];
    for (int i = 0; i < LANES; ++i) at[i] = std::min(p + i, to - 1);
    dots(above, high, at, step_high, more, LANES);
    dots(below, low, at, step_low, less, LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < std::min<int64_t>(LANES, to - p); ++i) {
        const float found = more[r * LANES + i] + less[r * LANES + i];
        x[r * room + p + i] = std::isfinite(found) ? found : bound(q + r * WIDTH, low + at[i] * step_low, high + at[i] * step_high);
      }
  }
}

// x = log softmax(scale x) over the pages that are shown, -inf for the others; up to `room`, a multiple of LANES, x may be written to.
void log_shares(float* x, const uint8_t* shown, int64_t pages, int64_t room, float scale) {
  float most = LOWEST;
  vec total{};
  for (int64_t p = 0; p < room; ++p) x[p] = p < pages && (!shown || shown[p]) ? x[p] * scale : -INFINITY;
  for (int64_t p = 0; p < pages; ++p) most = std::max(most, x[p]);
  for (int64_t p = 0; p < room; p += LANES) total += exp_negative(load(x + p) - most);
  const float mass = most + std::log(sum(total));
  for (int64_t p = 0; p < pages; ++p) x[p] -= mass;
}

// out [B, choices, pages]: the mean over each choice's heads of the largest q.k that a page's bounds allow; infinite bounds count as 0.
// With `any` it is the largest of the heads' log softmax of that over pages. Rows of the batch that skip [B] names are 0.
extern "C" void score_pages(const T* q, const T* low, const T* high, float* out, const Sizes* sizes, const Steps* of_low, const Steps* of_high,
                            int64_t choices, const uint8_t* skip, int64_t any, const uint8_t* shown, int64_t shown_step, float scale) {
  const int64_t batch = sizes->batch, heads = sizes->heads, groups = sizes->groups, pages = sizes->keys;
  const int64_t units = heads / ROWS, share = heads / choices, chunk = BLOCK, chunks = (pages + chunk - 1) / chunk;
  const int64_t threads = worth(2 * batch * groups * pages * WIDTH * sizeof(T), sizes->threads);
  const int64_t room = any ? (pages + LANES - 1) / LANES * LANES : pages;
  const bool alone = share == 1 && !any;
  std::vector<float> kept(alone ? 0 : batch * heads * room);
  float* const each = alone ? out : kept.data();
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t unit = 0; unit < batch * units; ++unit)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t b = unit / units, head = unit % units * ROWS, group = head / (heads / groups), end = std::min(pages, (c + 1) * chunk);
      float rows[ROWS * WIDTH], *to = each + (b * heads + head) * room;
      for (int r = 0; r < ROWS; ++r) {
        to_float(q + (b * heads + head + r) * WIDTH, 1.0f, rows + r * WIDTH, WIDTH);
        if (skip && skip[b]) std::fill(to + r * room + c * chunk, to + r * room + end, 0.0f);
      }
      if (!skip || !skip[b])
        bound_part(rows, low + b * of_low->batch + group * of_low->head, high + b * of_high->batch + group * of_high->head, of_low->row,
                   of_high->row, c * chunk, end, to, room);
    }
  if (alone) return;
  for (int64_t row = 0; row < batch * heads; ++row) {
    const float* from = each + row * room;
    float* const to = out + row / share * pages;
    const bool first = row % share == 0;
    if (any && !(skip && skip[row / heads])) log_shares(each + row * room, shown ? shown + row / heads * shown_step : nullptr, pages, room, scale);
    for (int64_t p = 0; p < pages; ++p) to[p] = any ? (first ? from[p] : std::max(to[p], from[p])) : (first ? 0.0f : to[p]) + from[p] / share;
  }
}

// Scores as integers of the same order; the first `sinks` and the last `recents` of the visible keys above, hidden ones below all others.
void ordered_scores(const float* score, const uint8_t* shown, int64_t keys, int64_t sinks, int64_t recents, int32_t* x) {
  for (int64_t j = 0; j < keys; ++j) {
    const float s = score[j] != score[j] ? 0.0f : std::min(1e30f, std::max(-1e30f, score[j]));
    int32_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    x[j] = s == 0.0f ? 0 : bits ^ ((bits >> 31) & 0x7fffffff);
  }
  if (!shown) {
    std::fill(x, x + std::min(sinks, keys), INT32_MAX);
    std::fill(x + std::max<int64_t>(0, keys - recents), x + keys, INT32_MAX);
    return;
  }
  int64_t seen = 0, rank = 0;
  for (int64_t j = 0; j < keys; ++j) seen += shown[j] != 0;
  for (int64_t j = 0; j < keys; ++j) {
    rank += shown[j] != 0;
    if (!shown[j]) x[j] = INT32_MIN;
    else if (rank <= sinks || rank > seen - recents) x[j] = INT32_MAX;
  }
}

// The largest x that `count` of the keys reach: halving, since counting runs on whole vectors where sorting runs key by key.
int32_t least_of_best(const int32_t* x, int64_t keys, int64_t count) {
  int64_t low = INT32_MIN, high = int64_t(INT32_MAX) + 1;  // `count` keys reach low, fewer reach high
  while (high - low > 1) {
    const int32_t middle = int32_t((low + high) >> 1);
    int32_t reach = 0;
    for (int64_t j = 0; j < keys; ++j) reach += x[j] >= middle;
    (reach >= count ? low : high) = middle;
    if (reach == count) break;
  }
  return int32_t(low);
}

// out [B, choices, count]: the best `count` of `keys` scores, sorted by index, ties to the lower one; sinks and recents of the visible keys first.
extern "C" void select_best(const float* score, const uint8_t* visible, int64_t* out, int64_t batch, int64_t choices, int64_t keys, int64_t mask_step,
                            int64_t count, int64_t sinks, int64_t recents, int64_t threads) {
  const int64_t rows = batch * choices, awake = rows > 1 ? worth(16 * rows * keys * sizeof(float), threads) : 1;
#pragma omp parallel for num_threads(awake)
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<int32_t> x(keys);
    ordered_scores(score + row * keys, visible ? visible + row / choices * mask_step : nullptr, keys, sinks, recents, x.data());
    const int32_t least = least_of_best(x.data(), keys, count);
    int64_t ties = count, *to = out + row * count;
    for (int32_t s : x) ties -= s > least;
    for (int64_t j = 0; j < keys; ++j)
      if (x[j] > least || (x[j] == least && ties-- > 0)) *to++ = j;
  }
}
