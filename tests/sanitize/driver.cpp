// driver RECURRENT ATTENTION ENCODER [SEED]: runs so many random cases of each kernel family on every instruction set, and
// of normalised recurrences a quarter of RECURRENT.
#include "harness.h"

extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

int main(int argc, char** argv) {
  uint64_t seed = argc > 4 ? std::strtoull(argv[4], nullptr, 10) : 1;
  int cases = 0, failures = 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (__sanitizer_set_death_callback)
    __sanitizer_set_death_callback([] { std::printf("FAILED %s\n", driver::current.c_str()); });
  std::printf("instruction sets: %s\n", fastseq::usable_isas());
  auto asked = [&](int place) { return argc > place ? std::atol(argv[place]) : 0; };
  const struct {
    int (*run)(uint64_t seed);
    long count;
  } families[] = {{driver::recurrent_case, asked(1)}, {driver::attention_case, asked(2)}, {driver::encoder_case, asked(3)},
                  {driver::normed_case, asked(1) / 4}};
  for (const auto& family : families)
    for (long i = 0; i < family.count; ++i, ++cases) failures += family.run(seed + uint64_t(i)) != 0;
#if defined(FASTSEQ_TILE_MODEL)
  std::printf("%ld products of tiles\n", tile_model::products.load());
  if (tile_model::products < cases) ++failures;  // then something else was tested
#endif
  std::printf("%d passed, %d failed\n", cases - failures, failures);
  return failures != 0;
}
