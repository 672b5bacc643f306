// tile_faults N: does the Nth wrong thing with the tiles, which the model must refuse; 0 does everything right, and
// compares the product with one computed plainly. Compiled by tests/recurrent/test_tiles.py.
#include "core/tiles.h"

using namespace fastseq::FASTSEQ_ISA;

namespace {

uint16_t narrowed(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return uint16_t(bits >> 16);
}

int right_product() {
  constexpr int M = 5, K = 7, N = 3;  // rows, pairs, columns
  uint16_t a[M][2 * K], b[K][2 * N];
  float af[M][2 * K], bf[2 * K][N], c[M][N];
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < 2 * K; ++k) a[m][k] = narrowed(af[m][k] = float(m - k) / 4);
  for (int k = 0; k < 2 * K; ++k)
    for (int n = 0; n < N; ++n) b[k / 2][2 * n + k % 2] = narrowed(bf[k][n] = float(k * n - 5) / 8);
  TileShapes shapes;
  shapes.shape(0, M, 4 * N);
  shapes.shape(1, M, 4 * K);
  shapes.shape(2, K, 4 * N);
  tile_configure(shapes);
  tile_zero<0>();
  tile_load<1>(a, sizeof a[0]);
  tile_load<2>(b, sizeof b[0]);
  tile_multiply<0, 1, 2>();
  tile_multiply<0, 1, 2>();
  tile_store<0>(c, sizeof c[0]);
  tile_release();
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float expected = 0;
      for (int k = 0; k < 2 * K; ++k) expected += 2 * af[m][k] * bf[k][n];
      if (c[m][n] != expected) return std::printf("FAILED: %g, expected %g\n", c[m][n], expected), 1;  // exact here
    }
  return tile_model::configured != 0;
}

// The same of bytes, unsigned or signed and signed, from a start.
int right_product_of_bytes(bool is_signed) {
  constexpr int M = 5, K = 7, N = 3;  // rows, fours, columns
  uint8_t a[M][4 * K];
  int8_t b[K][4 * N];
  int32_t start[N], c[M][N];
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < 4 * K; ++k) a[m][k] = uint8_t(255 - 9 * m - k);
  for (int k = 0; k < 4 * K; ++k)
    for (int n = 0; n < N; ++n) b[k / 4][4 * n + k % 4] = int8_t(k * n - 128 + 100 * (k % 2));
  for (int n = 0; n < N; ++n) start[n] = 1000000 * (n - 1);
  TileShapes shapes;
  shapes.shape(0, M, 4 * N);
  shapes.shape(1, M, 4 * K);
  shapes.shape(2, K, 4 * N);
  tile_configure(shapes);
  tile_load<0>(start, 0);
  tile_load<1>(a, sizeof a[0]);
  tile_load<2>(b, sizeof b[0]);
  if (is_signed)
    tile_multiply_signed_bytes<0, 1, 2>();
  else
    tile_multiply_bytes<0, 1, 2>();
  tile_store<0>(c, sizeof c[0]);
  tile_release();
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      int32_t expected = start[n];
      for (int k = 0; k < 4 * K; ++k) expected += (is_signed ? int8_t(a[m][k]) : a[m][k]) * b[k / 4][4 * n + k % 4];
      if (c[m][n] != expected) return std::printf("FAILED: %d, expected %d\n", c[m][n], expected), 1;
    }
  return tile_model::configured != 0;
}

void configure(int rows_c, int bytes_c, int rows_a, int bytes_a, int rows_b, int bytes_b) {
  TileShapes shapes;
  shapes.shape(0, rows_c, bytes_c);
  shapes.shape(1, rows_a, bytes_a);
  shapes.shape(2, rows_b, bytes_b);
  tile_configure(shapes);
  alignas(64) static char memory[16 * 64];
  tile_zero<0>();
  tile_load<1>(memory, 64);
  tile_load<2>(memory, 64);
  tile_multiply<0, 1, 2>();
}

}  // namespace

int main(int, char** argv) {
  alignas(64) static char memory[16 * 64];
  TileShapes shapes;
  switch (std::atoi(argv[1])) {
    case 0: return right_product() || right_product_of_bytes(false) || right_product_of_bytes(true);
    case 1: tile_zero<0>(); break;                             // nothing was configured
    case 2: shapes.shape(0, 17, 64), tile_configure(shapes); break;
    case 3: shapes.shape(0, 16, 68), tile_configure(shapes); break;
    case 4: shapes.shape(8, 16, 64), tile_configure(shapes); break;  // a ninth tile
    case 5: shapes.shape(0, 16, 0), tile_configure(shapes); break;
    case 6: shapes.palette = 2, tile_configure(shapes); break;
    case 7: tile_configure(shapes), tile_zero<0>(); break;     // left out of the configuration
    case 8: shapes.shape(0, 1, 4), tile_configure(shapes), tile_store<0>(memory, 64); break;  // never written
    case 9: configure(5, 64, 4, 64, 16, 64); break;            // C and A differ in rows
    case 10: configure(4, 32, 4, 64, 16, 64); break;           // C and B differ in columns
    case 11: configure(4, 64, 4, 64, 15, 64); break;           // A's columns are not B's rows
    case 12: configure(4, 64, 4, 62, 15, 64); break;           // half a pair
    case 13:
      configure(16, 64, 16, 64, 16, 64);
      tile_multiply<0, 1, 1>();
      break;
    case 15:
      configure(16, 64, 16, 64, 16, 64);
      tile_multiply_bytes<0, 1, 1>();
      break;
    case 16:
      configure(16, 64, 16, 64, 16, 64);
      tile_multiply_signed_bytes<0, 1, 1>();
      break;
    case 14:
      configure(16, 64, 16, 64, 16, 64);
      tile_release();
      tile_store<0>(memory, 64);
      break;
    default: return 3;
  }
  return 0;
}
