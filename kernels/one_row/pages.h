// Parts of kernels that choose keys or pages of keys: bounds of q.k, what heads agree on, and the best of some scores.
// In front of this text stand vectors.h, rows.h and what they need.
namespace {

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

// One unit's bounds of pages [from, to), x [R, room]: what is positive in q against `high`, what is negative against `low`.
template <int R>
void bound_part(const float* q, const T* low, const T* high, int64_t step_low, int64_t step_high, int64_t from, int64_t to, float* x, int64_t room) {
  float above[R * WIDTH], below[R * WIDTH], less[R * LANES];
  for (int i = 0; i < R * WIDTH; ++i) { above[i] = std::max(q[i], 0.0f); below[i] = std::min(q[i], 0.0f); }
  for (int64_t p = from; p < to; p += LANES) {
    int64_t at[LANES];
    float more[R * LANES];
    for (int i = 0; i < LANES; ++i) at[i] = std::min(p + i, to - 1);
    dots<R>(above, high, at, step_high, more, LANES);
    dots<R>(below, low, at, step_low, less, LANES);
    for (int r = 0; r < R; ++r)
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

// to [pages]: what `share` heads with scores x [share, room] say together, their mean; with `any` the largest of their log softmax.
void agree(float* x, float* to, int64_t share, int64_t pages, int64_t room, bool any, const uint8_t* shown, float scale) {
  for (int64_t r = 0; r < share; ++r) {
    float* const from = x + r * room;
    if (any) log_shares(from, shown, pages, room, scale);
    for (int64_t p = 0; p < pages; ++p) to[p] = any ? (r ? std::max(to[p], from[p]) : from[p]) : (r ? to[p] : 0.0f) + from[p] / share;
  }
}

// Bounds of q.k in pages, in parts that threads may take in any order: R heads over a chunk of pages each.
template <int R>
struct PageBounds {
  const T *q, *low, *high; const Sizes* sizes; const Steps *of_low, *of_high;  // sizes->keys counts pages
  static constexpr int64_t CHUNK = BLOCK;

  int64_t chunks() const { return (sizes->keys + CHUNK - 1) / CHUNK; }
  int64_t parts() const { return sizes->batch * (sizes->heads / R) * chunks(); }
  int64_t bytes() const { return 2 * sizes->batch * sizes->groups * sizes->keys * WIDTH * sizeof(T); }

  void part(int64_t item, float* each, int64_t room, const uint8_t* skip) const {  // each [B, H, room]
    const int64_t heads = sizes->heads, of_batch = heads / R, unit = item / chunks(), from = item % chunks() * CHUNK;
    const int64_t b = unit / of_batch, head = unit % of_batch * R, group = head / (heads / sizes->groups), to = std::min(sizes->keys, from + CHUNK);
    float rows[R * WIDTH], *x = each + (b * heads + head) * room;
    for (int r = 0; r < R; ++r) {
      to_float(q + (b * heads + head + r) * WIDTH, 1.0f, rows + r * WIDTH, WIDTH);
      if (skip && skip[b]) std::fill(x + r * room + from, x + r * room + to, 0.0f);
    }
    if (!skip || !skip[b])
      bound_part<R>(rows, low + b * of_low->batch + group * of_low->head, high + b * of_high->batch + group * of_high->head, of_low->row,
                    of_high->row, from, to, x, room);
  }
};

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
}// to [count]: the best of scores [keys], sorted by index, ties to the lower one; sinks and recents of the visible keys first.
void choose_best(const float* score, const uint8_t* shown, int64_t keys, int64_t count, int64_t sinks, int64_t recents, int64_t* to) {
  std::vector<int32_t> x(keys);
  ordered_scores(score, shown, keys, sinks, recents, x.data());
  const int32_t least = least_of_best(x.data(), keys, count);
  int64_t ties = count;
  for (int32_t s : x) ties -= s > least;
  for (int64_t j = 0; j < keys; ++j)
    if (x[j] > least || (x[j] == least && ties-- > 0)) *to++ = j;
}

}  // namespace
