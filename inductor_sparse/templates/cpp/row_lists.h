// Compressed rows of an activation, and sums of weight rows over them.
//
// Legend: M rows of the activation (tokens), K its columns (neurons), N columns of the
// weight W [K, N].  A row of the activation becomes a list of (index, value) of the
// neurons that are not zero; Y[m] is the sum of value * W[index] over that list.
//
// Three ways to sum, by the number of rows M and of what they keep:
//   stream_rows   a few rows, or very sparse ones: memory bound, so for each row of the
//                 activation every surviving row of W is read once, whole;
//   ByNeuron      some sparse rows: still memory bound, but now rows share neurons, so each
//                 row of W that any of them needs is read once and added to all those;
//   accumulate    many rows: BLOCK_K x BLOCK_N panels of W are copied to a contiguous
//                 buffer that stays in cache (rows of W are N elements apart: used in
//                 place they would fall on a few cache sets and one page each), and the
//                 BLOCK_N sums of a row are held in vector registers over a panel.
// Inductor brings vectors only where the CPU has them; this header also emulates them.
#include <ATen/cpu/vec/vec.h>
using Vec = at::vec::Vectorized<float>;

// Products of two bf16 pairs per lane and instruction, where the CPU has it.
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
constexpr bool HAS_BF16_DOT = true;
#else
constexpr bool HAS_BF16_DOT = false;
#endif
template <typename T>
constexpr bool USES_BF16_DOT = HAS_BF16_DOT && std::is_same_v<T, at::BFloat16>;
// What a list holds as values, and a panel as weights.
template <typename T>
using Operand = std::conditional_t<USES_BF16_DOT<T>, at::BFloat16, float>;
template <typename T>
constexpr int64_t BLOCK_N = USES_BF16_DOT<T> ? 128 : 64;
template <typename T>
constexpr int64_t BLOCK_K = USES_BF16_DOT<T> ? 512 : 256;
// A panel ends with a row of zeros, the partner of a list's odd last entry.
template <typename T>
constexpr int64_t PANEL_ROWS = BLOCK_K<T> + 1;
// Panels copied together: reading W in pieces of 256 bytes would waste its bandwidth.
template <typename T>
constexpr int64_t PANELS = USES_BF16_DOT<T> ? 2 : 4;
// Rows of W that are asked for ahead of the row being copied.
constexpr int64_t PREFETCH_ROWS = 16;
// The sums of one group of columns fill at most half of a usual L2 cache.
constexpr int64_t SUMS_BYTES = 512 * 1024;
// Up to so many rows W is streamed whatever they keep.
constexpr int64_t STREAM_ROWS = 4;
// Up to so many rows it is used neuron by neuron: none with the bf16 dot product, whose
// panels are faster even for a few rows.
template <typename T>
constexpr int64_t NEURON_ROWS = USES_BF16_DOT<T> ? STREAM_ROWS : 32;
// ... unless more than this fraction is kept: then panels read W as little, and hold the
// sums in registers.
constexpr double NEURON_DENSITY = 0.2;
// Up to so many rows leave some rows of W to no list.
constexpr int64_t UNION_ROWS = 64;
// Columns used together neuron by neuron: the sums of all rows stay in cache.
constexpr int64_t NEURON_COLS = 1024;

enum class Activation { identity, relu, relu2 };

template <Activation ACT>
inline float activate(float v) {
  if constexpr (ACT != Activation::identity) v = v > 0.f || v != v ? v : 0.f;
  if constexpr (ACT == Activation::relu2) v = v * v;
  return v;
}

template <Activation ACT>
inline Vec activate(Vec v) {
  // maximum() keeps NaN, as relu does.
  if constexpr (ACT != Activation::identity) v = at::vec::maximum(v, Vec(0.f));
  if constexpr (ACT == Activation::relu2) v = v * v;
  return v;
}

// Append the non-zeros of act(z[begin:end]) to a list; returns how many.  The list has
// room for 16 entries more than are kept.  NaN is kept, -0.0 is a zero.
template <typename T, Activation ACT, typename V>
inline int64_t compress(
    const T* z, int64_t begin, int64_t end, int32_t* index, V* value) {
  int64_t count = 0, k = begin;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i lane =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; k + 16 <= end; k += 16) {
    Vec v;
    if constexpr (std::is_same_v<T, float>) {
      v = activate<ACT>(Vec::loadu(z + k));
    } else {
      using Low = at::vec::Vectorized<T>;
      v = std::get<0>(at::vec::convert_to_float<T>(Low::loadu(z + k, 16)));
      v = activate<ACT>(v);
      // The dense graph rounds the activation to T: so do we, before looking for zeros.
      v = std::get<0>(at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(v, v)));
    }
    const __mmask16 keep = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i ks = _mm512_add_epi32(_mm512_set1_epi32((int32_t)k), lane);
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(keep, ks));
    const Vec packed = _mm512_maskz_compress_ps(keep, v);
    if constexpr (std::is_same_v<V, float>) {
      packed.store(value + count);
    } else {
      at::vec::convert_from_float<V>(packed, packed).store(value + count, 16);
    }
    count += __builtin_popcount(keep);
  }
#endif
  for (; k < end; k++) {
    const float v = (float)(T)activate<ACT>((float)z[k]);
    index[count] = (int32_t)k;
    value[count] = (V)v;
    count += v != 0.f;
  }
  return count;
}

// y[0:cols] += sum of v[q] * row[q][0:cols] over q; meanwhile `next` is asked for.
// Reading several rows at once, and the next ones ahead, is what fills the bandwidth:
// a row is too short for the hardware to see a stream in it.
template <typename T, int64_t ROWS>
inline void stream_group(
    float* y, const T* const* row, const T* const* next, const float* v, int64_t cols) {
  constexpr int64_t LANES = at::vec::Vectorized<T>::size();
  int64_t c = 0;
  for (; c + LANES <= cols; c += LANES) {
    if constexpr (std::is_same_v<T, float>) {
      Vec sum(0.f);
      c10::ForcedUnroll<ROWS>{}([&](auto q) {
        __builtin_prefetch(next[q] + c, 0, 2);
        sum = at::vec::fmadd(Vec(v[q]), Vec::loadu(row[q] + c), sum);
      });
      (Vec::loadu(y + c) + sum).store(y + c);
    } else {
      Vec low(0.f), high(0.f);
      c10::ForcedUnroll<ROWS>{}([&](auto q) {
        __builtin_prefetch(next[q] + c, 0, 2);
        const auto w = at::vec::convert_to_float<T>(
            at::vec::Vectorized<T>::loadu(row[q] + c));
        low = at::vec::fmadd(Vec(v[q]), std::get<0>(w), low);
        high = at::vec::fmadd(Vec(v[q]), std::get<1>(w), high);
      });
      (Vec::loadu(y + c) + low).store(y + c);
      (Vec::loadu(y + c + Vec::size()) + high).store(y + c + Vec::size());
    }
  }
  for (; c < cols; c++)
    for (int64_t q = 0; q < ROWS; q++) y[c] += v[q] * (float)row[q][c];
}

// y[0:cols] += sum of value[j] * w[index[j], 0:cols]: each row of W is read once.
template <typename T, typename V>
inline void stream_rows(
    float* y, const T* w, int64_t ldw, int64_t cols,
    const int32_t* index, const V* value, int64_t count) {
  constexpr int64_t ROWS = 8;
  const T* row[ROWS];
  const T* next[ROWS];
  float v[ROWS];
  int64_t j = 0;
  for (; j + ROWS <= count; j += ROWS) {
    for (int64_t q = 0; q < ROWS; q++) {
      row[q] = w + index[j + q] * ldw;
      next[q] = w + index[std::min(j + q + ROWS, count - 1)] * ldw;
      v[q] = (float)value[j + q];
    }
    stream_group<T, ROWS>(y, row, next, v, cols);
  }
  for (; j < count; j++) {
    row[0] = w + index[j] * ldw;
    next[0] = w + index[std::min(j + 1, count - 1)] * ldw;
    v[0] = (float)value[j];
    stream_group<T, 1>(y, row, next, v, cols);
  }
}

// The lists of several rows turned around: which rows keep a neuron, and its value there.
struct ByNeuron {
  std::vector<int32_t> neuron;  // those kept by any row, ascending
  std::vector<int32_t> begin;   // of each, its first entry; one more at the end
  std::vector<int32_t> row;     // of each entry
  std::vector<float> value;

  // `index` and `values` hold a list every `capacity` entries, `count(m)` its length.
  template <typename V, typename Count>
  ByNeuron(
      int64_t K, int64_t rows, int64_t capacity, const int32_t* index, const V* values,
      const Count& count) {
    if (rows == 0) return;
    std::vector<int32_t> next(K, 0);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t j = 0; j < count(m); j++) next[index[m * capacity + j]]++;
    int32_t entries = 0;
    for (int64_t k = 0; k < K; k++) {
      if (next[k] == 0) continue;
      neuron.push_back((int32_t)k);
      begin.push_back(entries);
      entries += std::exchange(next[k], entries);
    }
    begin.push_back(entries);
    row.resize(entries);
    value.resize(entries);
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t j = 0; j < count(m); j++) {
        const int32_t at = next[index[m * capacity + j]]++;
        row[at] = (int32_t)m;
        value[at] = (float)values[m * capacity + j];
      }
    }
  }

  // sums[m * ld + 0:cols] += the products of all entries with w[:, 0:cols].
  template <typename T>
  void add_to(float* sums, int64_t ld, const T* w, int64_t ldw, int64_t cols) const {
    constexpr int64_t AHEAD = 4;
    const int64_t last = (int64_t)neuron.size() - 1;
    for (int64_t u = 0; u <= last; u++) {
      const T* from = w + neuron[u] * ldw;
      const T* next = w + neuron[std::min(u + AHEAD, last)] * ldw;
      for (int32_t e = begin[u]; e < begin[u + 1]; e++) {
        stream_group<T, 1>(sums + row[e] * ld, &from, &next, &value[e], cols);
        next = from;  // asked for once
      }
    }
  }
};

// Which rows of each panel some list needs.
struct PanelRows {
  std::vector<int32_t> row;    // within its panel, ascending
  std::vector<int32_t> begin;  // of each panel, its first; one more at the end

  // `needed` has a flag for each of K neurons, or is empty if all are needed.
  PanelRows(int64_t K, int64_t panel_size, const std::vector<uint8_t>& needed) {
    row.reserve(K);
    begin.push_back(0);
    for (int64_t k = 0; k < K; k++) {
      if (needed.empty() || needed[k]) row.push_back((int32_t)(k % panel_size));
      if ((k + 1) % panel_size == 0 || k + 1 == K) begin.push_back((int32_t)row.size());
    }
  }
};

// Copy rows list[0:count] of w[:, 0:cols] to neighbouring panels, columns beyond `cols`
// as zeros.
template <typename T>
inline void copy_panels(
    const T* w, int64_t ldw, int64_t cols, const int32_t* list, int64_t count,
    Operand<T>* panels) {
  for (int64_t q = 0; q < count; q++) {
    const int64_t r = list[q];
    const T* from = w + r * ldw;
    const T* ahead = w + list[std::min(q + PREFETCH_ROWS, count - 1)] * ldw;
    for (int64_t c = 0; c < cols; c += 64 / (int64_t)sizeof(T))
      __builtin_prefetch(ahead + c);
    for (int64_t n = 0; n < cols; n += BLOCK_N<T>) {
      Operand<T>* to = panels + n * PANEL_ROWS<T> + r * BLOCK_N<T>;
      const int64_t width = std::min(BLOCK_N<T>, cols - n);
      if (width == BLOCK_N<T>) {
        for (int64_t c = 0; c < BLOCK_N<T>; c++) to[c] = (Operand<T>)from[n + c];
      } else {
        for (int64_t c = 0; c < width; c++) to[c] = (Operand<T>)from[n + c];
        for (int64_t c = width; c < BLOCK_N<T>; c++) to[c] = 0;
      }
    }
  }
}

// sums[0:BLOCK_N] += sum of value[j] * panel[index[j] - first], in vector registers.
// Each panel is summed from zero: many short sums lose less than one long one.
template <typename T>
inline void accumulate(
    float* sums, const Operand<T>* panel, const int32_t* index,
    const Operand<T>* value, int64_t count, int64_t first) {
  constexpr int64_t LANES = Vec::size(), VECS = BLOCK_N<T> / LANES;
  for (int64_t c = 0; c < BLOCK_N<T>; c += 16) __builtin_prefetch(sums + c, 1);
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  if constexpr (USES_BF16_DOT<T>) {
    // Interleaving two rows of W gives the pairs that the dot product sums; the order
    // of the sums is undone by restore_order().  An odd last row is paired with zeros.
    constexpr int64_t PAIRS = BLOCK_N<T> / 32;
    __m512 low[PAIRS], high[PAIRS];
    c10::ForcedUnroll<PAIRS>{}(
        [&](auto i) { low[i] = high[i] = _mm512_setzero_ps(); });
    const auto add = [&](int64_t even, int64_t odd, const T* values, size_t bytes) {
      int32_t two = 0;
      std::memcpy(&two, values, bytes);
      const __m512bh v = (__m512bh)_mm512_set1_epi32(two);
      c10::ForcedUnroll<PAIRS>{}([&](auto i) {
        const __m512i a = _mm512_loadu_si512(panel + even * BLOCK_N<T> + i * 32);
        const __m512i b = _mm512_loadu_si512(panel + odd * BLOCK_N<T> + i * 32);
        low[i] = _mm512_dpbf16_ps(low[i], v, (__m512bh)_mm512_unpacklo_epi16(a, b));
        high[i] = _mm512_dpbf16_ps(high[i], v, (__m512bh)_mm512_unpackhi_epi16(a, b));
      });
    };
    int64_t j = 0;
    for (; j + 2 <= count; j += 2)
      add(index[j] - first, index[j + 1] - first, value + j, 2 * sizeof(T));
    if (j < count) add(index[j] - first, BLOCK_K<T>, value + j, sizeof(T));
    c10::ForcedUnroll<PAIRS>{}([&](auto i) {
      (Vec::loadu(sums + i * 32) + Vec(low[i])).store(sums + i * 32);
      (Vec::loadu(sums + i * 32 + 16) + Vec(high[i])).store(sums + i * 32 + 16);
    });
    return;
  }
#endif
  if constexpr (!USES_BF16_DOT<T>) {
    Vec sum[VECS];
    c10::ForcedUnroll<VECS>{}([&](auto i) { sum[i] = Vec(0.f); });
    for (int64_t j = 0; j < count; j++) {
      const float* row = panel + (index[j] - first) * BLOCK_N<T>;
      const Vec v(value[j]);
      c10::ForcedUnroll<VECS>{}([&](auto i) {
        sum[i] = at::vec::fmadd(v, Vec::loadu(row + i * LANES), sum[i]);
      });
    }
    c10::ForcedUnroll<VECS>{}([&](auto i) {
      (Vec::loadu(sums + i * LANES) + sum[i]).store(sums + i * LANES);
    });
  }
}

// Put the sums of the bf16 dot product back into column order, in place: each 32 sums
// are (columns 0-3, 8-11, 16-19, 24-27) and then (4-7, 12-15, 20-23, 28-31).
inline void restore_order(float* sums, int64_t cols) {
  for (int64_t c = 0; c < cols; c += 32) {
    float in_order[32];
    for (int q = 0; q < 4; q++) {
      std::memcpy(in_order + q * 8, sums + c + q * 4, 4 * sizeof(float));
      std::memcpy(in_order + q * 8 + 4, sums + c + 16 + q * 4, 4 * sizeof(float));
    }
    std::memcpy(sums + c, in_order, sizeof(in_order));
  }
}

// Adds a call to ops.COUNTERS: memory of the runtime, so not an input only.
inline void count_call(const int64_t* memory, bool dense, int64_t kept, int64_t elements) {
  int64_t* const counters = const_cast<int64_t*>(memory);
  counters[0] += 1;
  counters[1] += dense;
  counters[2] += kept;
  counters[3] += elements;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Memory that is not set to zero first, aligned for vectors.
template <typename T>
struct Scratch {
  explicit Scratch(int64_t count)
      : data((T*)std::aligned_alloc(64, round_up(count * sizeof(T) + 64, 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* const data;
};
