// Runs a model of fastseq's layers without Python: run_package LIBFASTSEQ PACKAGE EXAMPLE
//   LIBFASTSEQ  fastseq/libfastseq.so of the installed package: the kernels and their schemas
//   PACKAGE     model.pt2, as package.py made it with AOTInductor
//   EXAMPLE     example.pt, an input and what Python computed from it
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package LIBFASTSEQ PACKAGE EXAMPLE\n";
    return 2;
  }
  // Loading it is all: it registers its operators with torch. It must come before the package, which asks for them.
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  std::ifstream file(argv[3], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto example = torch::pickle_load(bytes).toGenericDict();
  const at::Tensor x = example.at("x").toTensor(), expected = example.at("y").toTensor();

  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor y = model.run({x})[0];
  const double error = (y - expected).abs().max().item<double>();
  std::cout << "largest difference to Python: " << error << '\n';

  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) model.run({x});
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  std::cout << took.count() / 100 << " ms a call\n";
  return error < 1e-5 ? 0 : 1;
}
