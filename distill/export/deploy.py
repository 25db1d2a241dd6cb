"""export/README.md: how to run the exported files, in Python and in an app, with the images prepared as in the test."""

from collections.abc import Sequence
from pathlib import Path

from distill.data.base import Data
from distill.errors import UserError
from distill.export import onnx, openvino, torchscript
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
    good = {path for path, _ in every} - bad
    height, width = sides(data.image_size)
    covering = getattr(data.test.transform, "covered", sides)  # without: as in distill/data/prepare.py
    covered = covering(data.image_size)
    resized = f"its short side is resized to {covered[0]} px" if height == width else RESIZED.format(*covered)
    measured = {row.name: row for row in rows}
    listed = "\n".join(_line(measured[path.name], path, path in bad) for path, _ in every)
    chosen = "\n".join(f"- {line}" for line in _when([row for row in rows if folder / row.name in good]))
    shipping = [(path, format) for path, format in every if path not in bad]
    resizing = {path for path, format in shipping if _resizes(path, format)}
    names = ", ".join(path.name for path in sorted(resizing))
    whole = WHOLE_FILES.format(names=names, height=height, width=width) if resizing else ""
    said = {"classes": data.num_classes, "height": height, "width": width, "resized": resized, "whole": whole}
    parts = [INTRO.format(files=listed, chosen=chosen, **said)]
    formats = [name for name in SECTIONS if name in {format for _, format in shipping}]
    smallest = {name: min((path for path, format in shipping if format == name), key=size) for name in formats}
    shown = [path for name, path in smallest.items() if name != "torch_export"]
    if set(shown) - resizing:
        parts.append(PIXELS)
    if set(shown) & resizing:
        parts.append(PLANES)
    for name, path in smallest.items():
        parts.append(_section(SECTIONS[name], path in resizing).replace("FILE", path.name))
    text = "\n".join(parts)
    for name, value in {"HEIGHT": height, "WIDTH": width, "HIGH": covered[0], "WIDE": covered[1]}.items():
        text = text.replace(name, str(value))
    write(folder / "classes.txt", "".join(f"{name}\n" for name in data.classes).encode())
    write(folder / "README.md", text.encode())


def _section(text: str, resizes: bool) -> str:
    """A format's programs, for a file that takes prepared photos, or any."""
    if resizes:
        for given, instead in ANY_SIZE.items():
            text = text.replace(given, instead)
    prepare = [UPRIGHT, WHOLE if resizes else CROP, CLASSES]
    return text.replace("PREPARE\n", "".join(prepare)).replace("ANSWER\n", ANSWER)


def _resizes(path: Path, format: str) -> bool:
    """Whether a file takes photos of any size, as it says itself."""
    try:
        return format in DESCRIBED and bool(DESCRIBED[format](path)["input"].get("resize"))
    except UserError:  # nothing can be read of it, as the report says
        return False


def _line(row, path: Path, failed: bool) -> str:
    """A file's line of the table."""
    accuracy = "–" if row.top1 is None else f"{row.top1:.2%}"
    latency = "–" if row.latency_ms is None else f"{row.latency_ms:.2f}"
    ships = "no: see the report" if failed else "yes" if row.latency_ms is not None else "not executed here"
    return f"| {path.name} | {row.format} | {accuracy} | {size(path):,} | {latency} | {ships} |"


def _when(rows: Sequence) -> list[str]:
    """For each file that may ship, when to; and what it has most of among those of its format."""
    lines = []
    for row in sorted(rows, key=lambda row: row.name):
        rivals = [each for each in rows if each.format == row.format]
        best = []
        for word, field, worth in (
            ("most accurate", "top1", 1),
            ("smallest", "bytes", -1),
            ("fastest", "latency_ms", -1),
        ):
            figures = [worth * value for each in rivals if (value := getattr(each, field)) is not None]
            own = getattr(row, field)
            if own is not None and len(figures) > 1 and worth * own == max(figures) > min(figures):
                best.append(word)
        tail = f"; of these the {' and the '.join(best)}" if best else ""
        lines.append(f"{row.name}: {WHEN.get(row.format, 'an exporter of your own')}{tail}")
    return lines


DESCRIBED = {  # how a file of the formats that can resize is asked what it takes
    "onnx": onnx.read_metadata,
    "openvino": openvino.read_metadata,
    "torchscript": torchscript.read_metadata,
    "lite": torchscript.read_metadata,
}

WHEN = {
    "litert": "apps for Android and iOS that use LiteRT",
    "coreml": "apps for iPhone, iPad and Mac",
    "executorch": "apps for Android and iOS that use ExecuTorch",
    "onnx": "servers, desktops and apps, with ONNX Runtime",
    "openvino": "computers with Intel's processors",
    "torchscript": "programs that have libtorch already; PyTorch no longer develops TorchScript",
    "lite": "apps that have PyTorch Mobile already; it is no longer developed, ExecuTorch follows it",
    "torch_export": "PyTorch itself, and compilers that start from its graph",
}

WHOLE_FILES = """These take upright photos of any height and width and do the rest themselves, but take one of exactly
{height} × {width} px as it is: {names}.
"""
RESIZED = "it is resized, in its shape, to the smallest that covers {} × {} px (height × width)"
INTRO = """# Running these files

| file | format | top-1 | bytes | ms | may ship |
| --- | --- | ---: | ---: | ---: | --- |
{files}

Top-1 on the test images; ms: one image on one thread of the machine that measured it. When to ship which:

{chosen}

Input: `images`, float32 (N, 3, {height}, {width}): RGB in planes (NCHW), values in [0, 1]; the files normalise them.
A photo is turned upright (EXIF), what is transparent in it is seen on white,
{resized} (bilinear, antialiased),
then its middle {height} × {width} px are cut out.
{whole}Output: logits (N, {classes}), one for each line of `classes.txt`; the programs make probabilities of them.
Each file also holds its input's description and the class names as JSON.

The Python programs take a photo: `python program.py photo.jpg`, in this folder; they print its class and probability.
"""

UPRIGHT = """import sys

import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open(sys.argv[1]))  # upright, before anything else
if image.mode.startswith("I"):  # 16 bits
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
image = image.convert("RGB")
"""
CROP = """width, height = image.size
length, own = (HIGH, height) if height * WIDE <= width * HIGH else (WIDE, width)  # the side that must grow more
image = image.resize([int(length * side / own) for side in image.size], Image.Resampling.BILINEAR)
left, top = round((image.width - WIDTH) / 2), round((image.height - HEIGHT) / 2)
image = np.array(image.crop((left, top, left + WIDTH, top + HEIGHT)), dtype=np.float32)
images = np.ascontiguousarray(image.transpose(2, 0, 1)[None] / 255)  # (1, 3, HEIGHT, WIDTH)
"""
WHOLE = """image = np.array(image, dtype=np.float32)
images = np.ascontiguousarray(image.transpose(2, 0, 1)[None] / 255)  # (1, 3, height, width): the file resizes
"""
CLASSES = """classes = open("classes.txt", encoding="utf-8").read().splitlines()
"""

ANSWER = """odds = np.exp(logits - logits.max())
odds /= odds.sum()
print(classes[odds.argmax()], f"{odds.max():.4f}")
"""

_KOTLIN_DECODE = """    val image = ImageDecoder.decodeBitmap(ImageDecoder.createSource(photo)) { decoder, _, _ ->
        decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE
    }
"""
_KOTLIN_SOFTMAX = """fun softmax(logits: FloatArray): List<Float> {
    val odds = logits.map { exp(it - logits.max()) }
    return odds.map { it / odds.sum() }
}
"""
_SWIFT_DECODE = """    let source = CGImageSourceCreateWithURL(photo as CFURL, nil)!
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
"""
_SWIFT_SOFTMAX = """func softmax(_ logits: [Float]) -> [Float] {
    let odds = logits.map { exp($0 - logits.max()!) }
    return odds.map { $0 / odds.reduce(0, +) }
}
"""

PIXELS = (
    """## Preparing a photo in an app

Both turn the photo upright before anything else, and resize as the Python programs do: an average weighted by a
triangle as wide as two pixels of the result, which the systems' own bilinear scaling is not when it makes an image
smaller.

Kotlin (Android 9 or newer; `ImageDecoder` turns the photo upright):

```kotlin
import android.graphics.ImageDecoder
import java.io.File
import kotlin.math.abs
import kotlin.math.exp

fun pixels(photo: File): FloatArray {
"""
    + _KOTLIN_DECODE
    + """    val isWide = image.height * WIDEL <= image.width * HIGHL
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

"""
    + _KOTLIN_SOFTMAX
    + """
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
"""
    + _SWIFT_DECODE
    + """    let (length, own) = height * WIDE <= width * HIGH ? (HIGH, height) : (WIDE, width)
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

"""
    + _SWIFT_SOFTMAX
    + """
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
)

PLANES = f"""## A whole photo in an app

For a file that takes photos of any size: upright, what is transparent on white. A photo of 12 million px takes 150 MB
as floats: where that is too much, let the system decode a JPEG at half or a quarter of its sides.

Kotlin (Android 9 or newer; `ImageDecoder` turns the photo upright):

```kotlin
import android.graphics.ImageDecoder
import java.io.File
import kotlin.math.exp

class Planes(val values: FloatArray, val height: Long, val width: Long)

fun planes(photo: File): Planes {{
{_KOTLIN_DECODE}    val argb = IntArray(image.width * image.height)
    image.getPixels(argb, 0, image.width, 0, 0, image.width, image.height)
    val values = FloatArray(3 * argb.size) {{ place ->
        val pixel = argb[place % argb.size]
        val alpha = pixel ushr 24
        val value = pixel shr (16 - 8 * (place / argb.size)) and 0xFF
        (value * alpha + 255 * (255 - alpha)) / (255f * 255f)
    }}
    return Planes(values, image.height.toLong(), image.width.toLong())
}}

{_KOTLIN_SOFTMAX}```

Swift:

```swift
import ImageIO

func planes(_ photo: URL) -> (values: [Float], height: Int, width: Int) {{
{_SWIFT_DECODE}    let count = width * height
    return ((0..<3 * count).map {{ Float(rgba[4 * ($0 % count) + $0 / count]) / 255 }}, height, width)
}}

{_SWIFT_SOFTMAX}```
"""

# what stands in a format's programs for apps, for a file that takes photos of any size
ANY_SIZE = {
    "let values = pixels(photo)": "let image = planes(photo)\nlet values = image.values",
    "val input = ": "val image = planes(photo)\nval input = ",
    "pixels(photo)": "image.values",
    "longArrayOf(1, 3, HEIGHT, WIDTH)": "longArrayOf(1, 3, image.height, image.width)",
    "shape: [1, 3, HEIGHT, WIDTH]": "shape: [1, 3, image.height as NSNumber, image.width as NSNumber]",
    "{1, 3, HEIGHT, WIDTH}": "{1, 3, height, width}",
}

SECTIONS = {
    "litert": """## LiteRT

```python
PREPARE
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter("FILE")
interpreter.allocate_tensors()
(given,), (asked,) = interpreter.get_input_details(), interpreter.get_output_details()
if given["dtype"] == np.int8:
    scale, zero_point = given["quantization"]
    images = np.clip(np.rint(images / scale) + zero_point, -128, 127).astype(np.int8)
interpreter.set_tensor(given["index"], images)
interpreter.invoke()
logits = interpreter.get_tensor(asked["index"])[0].astype(np.float32)
if asked["dtype"] == np.int8:
    scale, zero_point = asked["quantization"]
    logits = (logits - zero_point) * scale
ANSWER
```

Android (`com.google.ai.edge.litert:litert`):

```kotlin
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel

val model = CompiledModel.create(assets, "FILE", CompiledModel.Options(Accelerator.CPU))
val (inputs, outputs) = model.createInputBuffers() to model.createOutputBuffers()
inputs[0].writeFloat(pixels(photo))
model.run(inputs, outputs)
val probabilities = softmax(outputs[0].readFloat())
```

iOS (pod `TensorFlowLiteSwift`):

```swift
import TensorFlowLite

let interpreter = try Interpreter(modelPath: path)
try interpreter.allocateTensors()
try interpreter.copy(pixels(photo).withUnsafeBytes { Data($0) }, toInputAt: 0)
try interpreter.invoke()
let probabilities = softmax(try interpreter.output(at: 0).data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) })
```

A file made with `export.litert.io=int8` takes a photo's bytes less 128 and gives int8 logits: their scale and zero
point are in the file, as the Python program reads them.
""",
    "coreml": """## Core ML

On a Mac:

```python
PREPARE
import coremltools

model = coremltools.models.MLModel("FILE")
logits = model.predict({"images": Image.fromarray(image.astype(np.uint8))})["logits"][0]
ANSWER
```

iOS and macOS, with the folder in the app's resources at `url`:

```swift
import CoreML

var buffer: CVPixelBuffer?
CVPixelBufferCreate(nil, WIDTH, HEIGHT, kCVPixelFormatType_32BGRA, nil, &buffer)
CVPixelBufferLockBaseAddress(buffer!, [])
let bytes = CVPixelBufferGetBaseAddress(buffer!)!.assumingMemoryBound(to: UInt8.self)
let (row, values) = (CVPixelBufferGetBytesPerRow(buffer!), pixels(photo))
for place in 0..<HEIGHT * WIDTH {
    for channel in 0..<3 {  // planes of RGB to BGRA
        let value = UInt8((255 * values[channel * HEIGHT * WIDTH + place]).rounded())
        bytes[place / WIDTH * row + 4 * (place % WIDTH) + 2 - channel] = value
    }
}
CVPixelBufferUnlockBaseAddress(buffer!, [])
let model = try MLModel(contentsOf: try await MLModel.compileModel(at: url))
let input = try MLDictionaryFeatureProvider(dictionary: ["images": MLFeatureValue(pixelBuffer: buffer!)])
let output = try model.prediction(from: input).featureValue(for: "logits")!.multiArrayValue!
let probabilities = softmax((0..<output.count).map { output[$0].floatValue })
```
""",
    "openvino": """## OpenVINO

```python
PREPARE
import openvino

# without the hint OpenVINO rounds to bfloat16 where the processor has it: faster, and about 1 % off
model = openvino.Core().compile_model("FILE/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
logits = model({"images": images})["logits"][0]
ANSWER
```
""",
    "executorch": """## ExecuTorch

```python
PREPARE
import torch
from executorch.runtime import Runtime

method = Runtime.get().load_program("FILE").load_method("forward")
logits = method.execute([torch.from_numpy(images)])[0][0].numpy()  # up to 8 images at once
ANSWER
```

Android (`org.pytorch:executorch-android`), with the file copied out of the assets to `path`:

```kotlin
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

val module = Module.load(path)
val input = Tensor.fromBlob(pixels(photo), longArrayOf(1, 3, HEIGHT, WIDTH))
val probabilities = softmax(module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray)
```

iOS (Swift package ExecuTorch: `executorch`, `backend_xnnpack`, `kernels_optimized`):

```swift
import ExecuTorch

let module = Module(filePath: path)
let input = Tensor<Float>(pixels(photo), shape: [1, 3, HEIGHT, WIDTH])
let output: Tensor<Float> = try module.forward(input)[0].tensor()!
let probabilities = softmax(output.scalars())
```
""",
    "onnx": """## ONNX Runtime

```python
PREPARE
import onnxruntime

session = onnxruntime.InferenceSession("FILE", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {"images": images})[0][0]
ANSWER
```

Android (`com.microsoft.onnxruntime:onnxruntime-android`):

```kotlin
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment

val environment = OrtEnvironment.getEnvironment()
val session = environment.createSession(assets.open("FILE").readBytes())
val input = OnnxTensor.createTensor(environment, FloatBuffer.wrap(pixels(photo)), longArrayOf(1, 3, HEIGHT, WIDTH))
val probabilities = softmax((session.run(mapOf("images" to input))[0].value as Array<FloatArray>)[0])
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
let probabilities = softmax(logits)
```
""",
    "torchscript": """## TorchScript (libtorch, Python)

```python
PREPARE
import torch

model = torch.jit.load("FILE")
with torch.no_grad():
    logits = model(torch.from_numpy(images))[0].numpy()
ANSWER
```
""",
    "lite": """## PyTorch Mobile's lite interpreter

```python
PREPARE
import torch
from torch.jit.mobile import _load_for_lite_interpreter

model = _load_for_lite_interpreter("FILE")
with torch.no_grad():
    logits = model(torch.from_numpy(images))[0].numpy()
ANSWER
```

Android (`org.pytorch:pytorch_android_lite`), with the file copied out of the assets to `path`:

```kotlin
import org.pytorch.IValue
import org.pytorch.LiteModuleLoader
import org.pytorch.Tensor

val module = LiteModuleLoader.load(path)
val input = Tensor.fromBlob(pixels(photo), longArrayOf(1, 3, HEIGHT, WIDTH))
val probabilities = softmax(module.forward(IValue.from(input)).toTensor().dataAsFloatArray)
```

iOS (pod `LibTorch-Lite`) has no Swift interface. In Objective-C++, behind a bridging header:

```objectivec++
torch::jit::mobile::Module module = torch::jit::_load_for_mobile(path.UTF8String);
c10::InferenceMode guard;
at::Tensor input = torch::from_blob(values, {1, 3, HEIGHT, WIDTH}, at::kFloat);
at::Tensor probabilities = module.forward({input}).toTensor().softmax(1);
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
    logits = model(torch.from_numpy(images))[0].numpy()
ANSWER
```
""",
}
