// score_pages, select_best and attend of one_row.cpp in one go, on a CPU: threads are woken once, and stay awake between them.
// In front of this text stand vectors.h, rows.h, pages.h, T, WIDTH, WIDTH_V, ROWS, and APART, which is 1 where each head chooses for itself.

// out [B, H, WIDTH_V]: attention to the best `count` pages of `page` keys, by bounds low and high [B, G, pages, WIDTH].
extern "C" void attend_best_pages(const T* q, const T* k, const T* v, T* out, const uint8_t* visible, const float* bias, const T* low, const T* high,
                                  const uint8_t* shown, const Sizes* sizes, const Sizes* of_pages, const Steps* of_k, const Steps* of_v,
                                  const Steps* of_mask, const Steps* of_low, const Steps* of_high, int64_t shown_step, int64_t choices, int64_t any,
                                  int64_t count, int64_t sinks, int64_t recents, int64_t page, float scale) {
  constexpr int R = APART ? 1 : ROWS;
  const int64_t pages = of_pages->keys, share = sizes->heads / choices, room = (pages + LANES - 1) / LANES * LANES;
  static thread_local std::vector<float> kept;  // not allocated anew for every layer
  kept.resize(std::max<size_t>(kept.size(), sizes->batch * (sizes->heads * room + choices * pages)));
  float* const each = kept.data(), *const score = each + sizes->batch * sizes->heads * room;
  std::vector<int64_t> index(sizes->batch * choices * count);
  const PageBounds<ROWS> bounds{q, low, high, of_pages, of_low, of_high};
  Attention<R> attention{q, k, v, visible, bias, index.data(), sizes, of_k, of_v, of_mask, choices, count, page, scale};
  const int64_t threads = worth(bounds.bytes() + attention.bytes(), sizes->threads);
  Work scoring(bounds.parts()), choosing(sizes->batch * choices), attending(attention.split(threads));
#pragma omp parallel num_threads(threads)
  {
    scoring.run([&](int64_t item) { bounds.part(item, each, room, nullptr); });
    choosing.run([&](int64_t row) {
      const uint8_t* const seen = shown ? shown + row / choices * shown_step : nullptr;
      agree(each + row * share * room, score + row * pages, share, pages, room, any, seen, scale);
      choose_best(score + row * pages, seen, pages, count, sinks, recents, index.data() + row * count);
    });
    attending.run([&](int64_t item) { attention.part(item); });
  }
  for (int64_t unit = 0; unit < attention.units(); ++unit) attention.join(unit, out);
}
