// Classifies prepared images with a package that AOTInductor compiled: no Python, no pyra.
//
// usage: classify MODEL.pt2 PIXELS.f32 SIDE
// PIXELS.f32 holds float32 pixel values [B, 3, SIDE, SIDE], normalised, in row-major order; one line of logits an image.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: classify MODEL.pt2 PIXELS.f32 SIDE\n";
    return 2;
  }
  const long side = std::strtol(argv[3], nullptr, 10);
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const long image = side > 0 ? 3 * side * side * static_cast<long>(sizeof(float)) : 0;
  if (image == 0 || bytes.empty() || bytes.size() % image != 0) {
    std::cerr << "classify: " << argv[2] << " has " << bytes.size() << " bytes, not a multiple of " << image
              << " (3 x SIDE x SIDE floats)\n";
    return 2;
  }
  const long batch = static_cast<long>(bytes.size()) / image;
  at::Tensor pixels = at::from_blob(bytes.data(), {batch, 3, side, side}, at::kFloat);
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Tensor logits = model.run({pixels})[0].contiguous();
  for (long row = 0; row < batch; ++row) {
    for (long column = 0; column < logits.size(1); ++column) {
      std::printf(column ? " %.6g" : "%.6g", logits[row][column].item<float>());
    }
    std::printf("\n");
  }
  return 0;
}
