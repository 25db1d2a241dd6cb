"""export/README.md: how to run the exported files, in Python and in an app, with the images prepared as in the test."""

from collections.abc import Sequence
from pathlib import Path

from distill.data.base import Data
from distill.files import size
from distill.runtimes.artifact import write
from distill.types import sides


def write_readme(rows: Sequence, data: Data, folder: Path, failures: Sequence[str] = ()) -> None:
    """Writes README.md and classes.txt into `folder`, in which the files are; formats that aren't there are left out.

    Args:
        rows: of the report, each with the `name` and `format` of a file in `folder`; others are left out.
        failures: of the report, "FILE: reason": such a file is listed as one that must not ship, and in no program.

    Raises:
        UserError: a file cannot be written.
    """
    every = sorted((folder / row.name, row.format) for row in rows if (folder / row.name).exists())
    bad = {path for path, _ in every if any(line.startswith(f"{path.name}: ") for line in failures)}
    height, width = sides(data.image_size)
    covered = data.test.transform.covered(data.image_size) if data.test.transform else (height, width)
    resized = f"its short side is resized to {covered[0]} px" if height == width else RESIZED.format(*covered)
    listed = "\n".join(
        f"| {path.name} | {format} | {size(path):,} | {'no: see the report' if path in bad else 'yes'} |"
        for path, format in every
    )
    parts = [INTRO.format(files=listed, classes=data.num_classes, height=height, width=width, resized=resized)]
    shipping = [(path, format) for path, format in every if path not in bad]
    formats = [name for name in SECTIONS if name in {format for _, format in shipping}]
    if set(formats) - {"torch_export"}:
        parts.append(PIXELS)
    for name in formats:
        smallest = min((path for path, format in shipping if format == name), key=size)
        parts.append(SECTIONS[name].replace("PREPARE\n", PREPARE).replace("FILE", smallest.name))
    text = "\n".join(parts)
    for name, value in {"HEIGHT": height, "WIDTH": width, "HIGH": covered[0], "WIDE": covered[1]}.items():
        text = text.replace(name, str(value))
    write(folder / "classes.txt", "".join(f"{name}\n" for name in data.classes).encode())
    write(folder / "README.md", text.encode())


RESIZED = "it is resized, in its shape, to the smallest that covers {} × {} px (height × width)"
INTRO = """# Running these files

| file | format | bytes | may ship |
| --- | --- | ---: | --- |
{files}

Input: `images`, float32 (N, 3, {height}, {width}): RGB in planes (NCHW), values in [0, 1]; the files normalise them.
A photo is turned upright (EXIF), what is transparent in it is seen on white,
{resized} (bilinear, antialiased),
then its middle {height} × {width} px are cut out.
Output: logits (N, {classes}), one for each line of `classes.txt`; `softmax` makes probabilities of them. Each file also
holds its input's description and the class names as JSON.

The Python programs take a photo: `python program.py photo.jpg`, in this folder.
"""

PREPARE = """import sys

import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open(sys.argv[1]))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
image = image.convert("RGB")
width, height = image.size
length, own = (HIGH, height) if height * WIDE <= width * HIGH else (WIDE, width)  # the side that must grow more
image = image.resize([int(length * side / own) for side in image.size], Image.Resampling.BILINEAR)
left, top = round((image.width - WIDTH) / 2), round((image.height - HEIGHT) / 2)
image = np.array(image.crop((left, top, left + WIDTH, top + HEIGHT)), dtype=np.float32)
images = np.ascontiguousarray(image.transpose(2, 0, 1)[None] / 255)  # (1, 3, HEIGHT, WIDTH)
classes = open("classes.txt", encoding="utf-8").read().splitlines()
"""

PIXELS = """## Preparing a photo in an app

Both resize as the Python programs do: an average weighted by a triangle as wide as two pixels of the result, which the
systems' own bilinear scaling is not when it makes an image smaller.

Kotlin (Android 9 or newer; `ImageDecoder` turns the photo upright):

```kotlin
import android.graphics.ImageDecoder
import java.io.File
import kotlin.math.abs

fun pixels(photo: File): FloatArray {
    val image = ImageDecoder.decodeBitmap(ImageDecoder.createSource(photo)) { decoder, _, _ ->
        decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE
    }
    val isWide = image.height * WIDEL <= image.width * HIGHL
    val (length, own) = if (isWide) HIGHL to image.height else WIDEL to image.width
    val across = triangles(image.width, (length * image.width / own).toInt(), WIDTH)
    val down = triangles(image.height, (length * image.height / own).toInt(), HEIGHT)
    val argb = IntArray(image.width)
    val narrow = Array(image.height) { y ->
        image.getPixels(argb, 0, image.width, 0, y, image.width, 1)
        FloatArray(3 * WIDTH) { place ->
            val (first, weights) = across[place % WIDTH]
            var sum = 0f
            for (i in weights.indices) {
                val alpha = argb[first + i] ushr 24
                val value = argb[first + i] shr (16 - 8 * (place / WIDTH)) and 0xFF
                sum += weights[i] * (value * alpha + 255 * (255 - alpha)) / 255f
            }
            sum
        }
    }
    return FloatArray(3 * HEIGHT * WIDTH) { place ->
        val (first, weights) = down[place / WIDTH % HEIGHT]
        val column = place / (HEIGHT * WIDTH) * WIDTH + place % WIDTH
        var sum = 0f
        for (i in weights.indices) sum += weights[i] * narrow[first + i][column]
        sum / 255f
    }
}

/** For each of the middle `size` of the `resized` pixels that `side` pixels become: the first one of it, weights. */
fun triangles(side: Int, resized: Int, size: Int): List<Pair<Int, FloatArray>> {
    val scale = side.toDouble() / resized
    val width = maxOf(scale, 1.0)
    val start = Math.rint((resized - size) / 2.0).toInt()
    return List(size) { place ->
        val center = (start + place + 0.5) * scale
        val first = maxOf(0, (center - width + 0.5).toInt())
        val last = minOf(side, (center + width + 0.5).toInt())
        val weights = DoubleArray(last - first) { maxOf(0.0, 1 - abs(first + it + 0.5 - center) / width) }
        first to FloatArray(weights.size) { (weights[it] / weights.sum()).toFloat() }
    }
}
```

Swift:

```swift
import ImageIO

func pixels(_ photo: URL) -> [Float] {
    let source = CGImageSourceCreateWithURL(photo as CFURL, nil)!
    let upright: [CFString: Any] = [
        kCGImageSourceCreateThumbnailFromImageAlways: true, kCGImageSourceCreateThumbnailWithTransform: true,
        kCGImageSourceThumbnailMaxPixelSize: 1 << 20]
    let image = CGImageSourceCreateThumbnailAtIndex(source, 0, upright as CFDictionary)!
    let (width, height) = (image.width, image.height)
    var rgba = [UInt8](repeating: 255, count: 4 * width * height)  // white
    rgba.withUnsafeMutableBytes { bytes in
        let context = CGContext(
            data: bytes.baseAddress, width: width, height: height, bitsPerComponent: 8, bytesPerRow: 4 * width,
            space: CGColorSpace(name: CGColorSpace.sRGB)!, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)!
        context.draw(image, in: CGRect(x: 0, y: 0, width: width, height: height))
    }
    let (length, own) = height * WIDE <= width * HIGH ? (HIGH, height) : (WIDE, width)
    let across = triangles(width, length * width / own, WIDTH)
    let down = triangles(height, length * height / own, HEIGHT)
    var narrow = [Float](repeating: 0, count: height * 3 * WIDTH)
    for y in 0..<height {
        for place in 0..<3 * WIDTH {
            let (first, weights) = across[place % WIDTH]
            for (i, weight) in weights.enumerated() {
                narrow[y * 3 * WIDTH + place] += weight * Float(rgba[4 * (y * width + first + i) + place / WIDTH])
            }
        }
    }
    return (0..<3 * HEIGHT * WIDTH).map { place in
        let (first, weights) = down[place / WIDTH % HEIGHT]
        let column = place / (HEIGHT * WIDTH) * WIDTH + place % WIDTH
        let sum = weights.enumerated().reduce(0) { $0 + $1.element * narrow[(first + $1.offset) * 3 * WIDTH + column] }
        return sum / 255
    }
}

/// For each of the middle `size` of the `resized` pixels that `side` pixels become: the first it is made of, weights.
func triangles(_ side: Int, _ resized: Int, _ size: Int) -> [(Int, [Float])] {
    let scale = Double(side) / Double(resized), width = max(scale, 1)
    let start = Int((Double(resized - size) / 2).rounded(.toNearestOrEven))
    return (0..<size).map { place in
        let center = (Double(start + place) + 0.5) * scale
        let first = max(0, Int(center - width + 0.5)), last = min(side, Int(center + width + 0.5))
        let weights = (first..<last).map { max(0, 1 - abs(Double($0) + 0.5 - center) / width) }
        let sum = weights.reduce(0, +)
        return (first, weights.map { Float($0 / sum) })
    }
}
```
"""

SECTIONS = {
    "executorch": """## ExecuTorch

```python
PREPARE
import torch
from executorch.runtime import Runtime

method = Runtime.get().load_program("FILE").load_method("forward")
logits = method.execute([torch.from_numpy(images)])[0][0]  # up to 8 images at once
print(classes[logits.argmax()], logits.max().item())
```

Android (`org.pytorch:executorch-android`), with the file copied out of the assets to `path`:

```kotlin
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

val module = Module.load(path)
val input = Tensor.fromBlob(pixels(photo), longArrayOf(1, 3, HEIGHT, WIDTH))
val logits = module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray
```

iOS (Swift package ExecuTorch: `executorch`, `backend_xnnpack`, `kernels_optimized`):

```swift
import ExecuTorch

let module = Module(filePath: path)
let input = Tensor<Float>(pixels(photo), shape: [1, 3, HEIGHT, WIDTH])
let output: Tensor<Float> = try module.forward(input)[0].tensor()!
let logits = output.scalars()
```
""",
    "onnx": """## ONNX Runtime

```python
PREPARE
import onnxruntime

session = onnxruntime.InferenceSession("FILE", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {"images": images})[0][0]
print(classes[logits.argmax()], logits.max().item())
```

Android (`com.microsoft.onnxruntime:onnxruntime-android`):

```kotlin
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment

val environment = OrtEnvironment.getEnvironment()
val session = environment.createSession(assets.open("FILE").readBytes())
val input = OnnxTensor.createTensor(environment, FloatBuffer.wrap(pixels(photo)), longArrayOf(1, 3, HEIGHT, WIDTH))
val logits = (session.run(mapOf("images" to input))[0].value as Array<FloatArray>)[0]
```

iOS (pod `onnxruntime-objc`):

```swift
import onnxruntime_objc

let environment = try ORTEnv(loggingLevel: .warning)
let session = try ORTSession(env: environment, modelPath: path, sessionOptions: nil)
let values = pixels(photo)
let data = NSMutableData(bytes: values, length: 4 * values.count)
let input = try ORTValue(tensorData: data, elementType: .float, shape: [1, 3, HEIGHT, WIDTH])
let output = try session.run(withInputs: ["images": input], outputNames: ["logits"], runOptions: nil)
let logits = (try output["logits"]!.tensorData() as Data).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
```
""",
    "torchscript": """## TorchScript (libtorch, Python)

```python
PREPARE
import torch

model = torch.jit.load("FILE")
with torch.no_grad():
    logits = model(torch.from_numpy(images))[0]
print(classes[logits.argmax()], logits.max().item())
```
""",
    "lite": """## PyTorch Mobile's lite interpreter

```python
PREPARE
import torch
from torch.jit.mobile import _load_for_lite_interpreter

model = _load_for_lite_interpreter("FILE")
with torch.no_grad():
    logits = model(torch.from_numpy(images))[0]
print(classes[logits.argmax()], logits.max().item())
```

Android (`org.pytorch:pytorch_android_lite`), with the file copied out of the assets to `path`:

```kotlin
import org.pytorch.IValue
import org.pytorch.LiteModuleLoader
import org.pytorch.Tensor

val module = LiteModuleLoader.load(path)
val input = Tensor.fromBlob(pixels(photo), longArrayOf(1, 3, HEIGHT, WIDTH))
val logits = module.forward(IValue.from(input)).toTensor().dataAsFloatArray
```

iOS (pod `LibTorch-Lite`) has no Swift interface. In Objective-C++, behind a bridging header:

```objectivec++
torch::jit::mobile::Module module = torch::jit::_load_for_mobile(path.UTF8String);
c10::InferenceMode guard;
at::Tensor input = torch::from_blob(values, {1, 3, HEIGHT, WIDTH}, at::kFloat);
at::Tensor logits = module.forward({input}).toTensor();
```
""",
    "torch_export": """## torch.export

For PyTorch and for compilers that start there; phones do not read it. `torch.export.load` may unpickle: load files of
your own only.

```python
PREPARE
import torch
import torch.ao.quantization.fx._decomposed  # the operators of int8 files

model = torch.export.load("FILE").module()
with torch.no_grad():
    logits = model(torch.from_numpy(images))[0]
print(classes[logits.argmax()], logits.max().item())
```
""",
}
