// Classifies prepared images with a package that AOTInductor compiled: no Python, no pyra.
//
// usage: classify EXPORTED PIXELS.f32
// EXPORTED is a folder of `pyra export --format aoti`. PIXELS.f32 holds float32 pixel values [B, 3, H, W], normalised,
// in row-major order. The logits of each image are printed as a line of JSON.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <regex>
#include <stdexcept>
#include <string>

static std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Compiled code does not check the shape of its input: a wrong one makes it read beyond the pixels.
static at::Tensor pixels_of(std::string& bytes, const std::string& record) {
  static const std::regex shape("\"input_shape\"\\s*:\\s*\\[\\s*3\\s*,\\s*(\\d+)\\s*,\\s*(\\d+)\\s*\\]");
  std::smatch found;
  if (!std::regex_search(record, found, shape)) throw std::runtime_error("export.json has no input_shape");
  const long height = std::stol(found[1]), width = std::stol(found[2]);
  const long image = 3 * height * width * static_cast<long>(sizeof(float)), size = static_cast<long>(bytes.size());
  if (image == 0 || size == 0 || size % image != 0) {
    throw std::runtime_error(std::to_string(size) + " bytes of pixels, not a multiple of " + std::to_string(image) +
                             ": float32 [B, 3, " + found[1].str() + ", " + found[2].str() + "]");
  }
  return at::from_blob(bytes.data(), {size / image, 3, height, width}, at::kFloat);
}

static void classify(const std::string& folder, const std::string& pixel_file) {
  std::string bytes = read(pixel_file);
  const at::Tensor pixels = pixels_of(bytes, read(folder + "/export.json"));
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
  const at::Tensor logits = model.run({pixels})[0].contiguous();
  for (long row = 0; row < logits.size(0); ++row) {
    for (long column = 0; column < logits.size(1); ++column) {
      std::printf(column ? ", %.9g" : "[%.9g", logits[row][column].item<float>());
    }
    std::printf("]\n");
  }
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: classify EXPORTED PIXELS.f32\n";
    return 2;
  }
  try {
    classify(argv[1], argv[2]);
  } catch (const c10::Error& error) {
    std::cerr << "classify: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
