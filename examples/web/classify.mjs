// usage: node classify.mjs EXPORTED IMAGE
// EXPORTED is a folder of `pyra export --format onnx`. Prints the most probable class as JSON.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web";
import sharp from "sharp";
import { normalise, squash } from "./pixels.mjs";

const [folder, image] = process.argv.slice(2);
if (!folder || !image) {
  console.error("usage: node classify.mjs EXPORTED IMAGE");
  process.exit(2);
}
const { metadata } = JSON.parse(await readFile(join(folder, "export.json"), "utf8"));
const labels = JSON.parse(metadata.labels);
const side = Number(metadata.image_size);
const [mean, std] = [metadata.mean, metadata.std].map((text) => text.split(" ").map(Number));

// Pillow ignores colour profiles, so they were ignored in training.
const decoded = sharp(image, { ignoreIcc: true });
const upright = decoded.rotate().flatten({ background: "white" }).toColourspace("srgb").removeAlpha();
const { data, info } = await upright.raw().toBuffer({ resolveWithObject: true });
const pixels = normalise(squash(data, info.width, info.height, side), side, mean, std);

ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(await readFile(join(folder, "model.onnx")));
const outputs = await session.run({ pixel_values: new ort.Tensor("float32", pixels, [1, 3, side, side]) });
const logits = Array.from(outputs.logits.data);
const highest = Math.max(...logits);
const powers = logits.map((value) => Math.exp(value - highest));
const total = powers.reduce((sum, value) => sum + value, 0);
const index = logits.indexOf(highest);
console.log(JSON.stringify({ label: labels[index], index, probability: powers[index] / total, logits }));
