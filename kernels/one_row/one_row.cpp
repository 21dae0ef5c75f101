// One query row a head over cached keys, on a CPU: attention, scores of keys, bounds of pages, and the best of them.
// In front of this text stand vectors.h, rows.h, pages.h, T, WIDTH and WIDTH_V, and ROWS (heads that read the same keys).
// Heads are taken ROWS at a time ("units"), so that each key is read once for all of them.

// out [B, H, WIDTH_V] = softmax(q k' scale + mask) v over the chosen keys; rows that see nothing are 0. index [B, choices, count] or null.
extern "C" void attend(const T* q, const T* k, const T* v, T* out, const uint8_t* visible, const float* bias, const int64_t* index,
                       const Sizes* sizes, const Steps* of_k, const Steps* of_v, const Steps* of_mask, int64_t choices, int64_t count, int64_t page, float scale) {
  Attention<ROWS> job{q, k, v, visible, bias, index, sizes, of_k, of_v, of_mask, choices, count, page, scale};
  const int64_t threads = worth(job.bytes(), sizes->threads), items = job.split(threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < items; ++item) job.part(item);
  for (int64_t unit = 0; unit < job.units(); ++unit) job.join(unit, out);
}

// One unit's logits of keys [from, to); with `vote` their exponentials, each row's against its own largest logit, which `top` keeps.
inline void score_part(const float* q, const T* k, int64_t step, const uint8_t* visible, int64_t from, int64_t to, bool vote, float* x,
                       int64_t room, float* top, float* mass, int64_t parts) {
  for (int64_t j = from; j < to; j += LANES) {
    int64_t at[LANES];
    for (int i = 0; i < LANES; ++i) at[i] = std::min(j + i, to - 1);
    dots<ROWS>(q, k, at, step, x + j, room);
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


// out [B, choices, pages]: the mean over each choice's heads of the largest q.k that a page's bounds allow; infinite bounds count as 0.
// With `any` it is the largest of the heads' log softmax of that over pages. Rows of the batch that skip [B] names are 0.
extern "C" void score_pages(const T* q, const T* low, const T* high, float* out, const Sizes* sizes, const Steps* of_low, const Steps* of_high,
                            int64_t choices, const uint8_t* skip, int64_t any, const uint8_t* shown, int64_t shown_step, float scale) {
  const PageBounds<ROWS> job{q, low, high, sizes, of_low, of_high};
  const int64_t pages = sizes->keys, share = sizes->heads / choices, room = any ? (pages + LANES - 1) / LANES * LANES : pages;
  const int64_t threads = worth(job.bytes(), sizes->threads), parts = job.parts();
  const bool alone = share == 1 && !any;
  std::vector<float> kept(alone ? 0 : sizes->batch * sizes->heads * room);
  float* const each = alone ? out : kept.data();
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < parts; ++item) job.part(item, each, room, skip);
  for (int64_t row = 0; !alone && row < sizes->batch * choices; ++row) {
    const int64_t b = row / choices;
    const bool own = any && !(skip && skip[b]);  // what is skipped is 0 as it is
    agree(each + row * share * room, out + row * pages, share, pages, room, own, shown ? shown + b * shown_step : nullptr, scale);
  }
}

// out [B, choices, count]: the best `count` of `keys` scores, as choose_best has them.
extern "C" void select_best(const float* score, const uint8_t* visible, int64_t* out, int64_t batch, int64_t choices, int64_t keys, int64_t mask_step,
                            int64_t count, int64_t sinks, int64_t recents, int64_t threads) {
  const int64_t rows = batch * choices, awake = rows > 1 ? worth(16 * rows * keys * sizeof(float), threads) : 1;
#pragma omp parallel for num_threads(awake)
  for (int64_t row = 0; row < rows; ++row)
    choose_best(score + row * keys, visible ? visible + row / choices * mask_step : nullptr, keys, count, sinks, recents, out + row * count);
}
