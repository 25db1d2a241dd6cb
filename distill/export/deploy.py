"""export/README.md: how to run the exported files, in Python and in an app, with the images prepared as in the test."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.data.base import Data
from distill.export import preparation
from distill.export.artifact import Artifact, write


def write_readme(files: Mapping[str, Sequence[Artifact]], data: Data, folder: Path) -> None:
    """Writes README.md and classes.txt into `folder`, in which the files are; formats that aren't there are left out.

    Raises:
        UserError: a file cannot be written.
    """
    every = sorted((file for several in files.values() for file in several), key=lambda file: file.path.name)
    formats = [name for name in SECTIONS if any(file.format == name for file in every)]
    size, short = data.image_size, preparation(data).get("short_side", data.image_size)
    listed = "\n".join(f"| {file.path.name} | {file.format} | {file.path.stat().st_size:,} |" for file in every)
    parts = [INTRO.format(files=listed, classes=data.num_classes, size=size, short=short)]
    if set(formats) - {"torch_export"}:
        parts.append(PIXELS)
    for name in formats:
        smallest = min((file.path for file in every if file.format == name), key=lambda path: path.stat().st_size)
        parts.append(SECTIONS[name].replace("PREPARE\n", PREPARE).replace("FILE", smallest.name))
    text = "\n".join(parts).replace("SIZE", str(size)).replace("SHORT", str(short))
    write(folder / "classes.txt", "".join(f"{name}\n" for name in data.classes).encode())
    write(folder / "README.md", text.encode())


INTRO = """# Running these files

| file | format | bytes |
| --- | --- | ---: |
{files}

Input: `images`, float32 (N, 3, {size}, {size}): RGB in planes (NCHW), values in [0, 1]; the files normalise them.
A photo's short side is resized to {short} px (bilinear, antialiased), then its middle {size} × {size} px are cut out.
Output: logits (N, {classes}), one for each line of `classes.txt`; `softmax` makes probabilities of them. Each file also
holds its input's description and the class names as JSON.

The Python programs take a photo: `python program.py photo.jpg`, in this folder.
"""

PREPARE = """import sys

import numpy as np
import torch
from PIL import Image

image = Image.open(sys.argv[1]).convert("RGB")
scale = SHORT / min(image.size)
image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
image = np.array(image.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32)
images = np.ascontiguousarray(image.transpose(2, 0, 1)[None] / 255)  # (1, 3, SIZE, SIZE)
classes = open("classes.txt", encoding="utf-8").read().splitlines()
"""

PIXELS = """## Preparing a photo in an app

Kotlin:

```kotlin
fun pixels(photo: Bitmap): FloatArray {
    val scale = SHORTf / minOf(photo.width, photo.height)
    val resized = Bitmap.createScaledBitmap(
        photo, (photo.width * scale).roundToInt(), (photo.height * scale).roundToInt(), true)
    val square = Bitmap.createBitmap(resized, (resized.width - SIZE) / 2, (resized.height - SIZE) / 2, SIZE, SIZE)
    val argb = IntArray(SIZE * SIZE)
    square.getPixels(argb, 0, SIZE, 0, 0, SIZE, SIZE)
    return FloatArray(3 * argb.size) { (argb[it % argb.size] shr (16 - 8 * (it / argb.size)) and 0xFF) / 255f }
}
```

Swift:

```swift
func pixels(_ photo: CGImage) -> [Float] {
    let scale = SHORT.0 / Double(min(photo.width, photo.height))
    let width = Double(photo.width) * scale, height = Double(photo.height) * scale
    var rgba = [UInt8](repeating: 0, count: 4 * SIZE * SIZE)
    rgba.withUnsafeMutableBytes { bytes in
        let context = CGContext(
            data: bytes.baseAddress, width: SIZE, height: SIZE, bitsPerComponent: 8, bytesPerRow: 4 * SIZE,
            space: CGColorSpace(name: CGColorSpace.sRGB)!, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)!
        context.interpolationQuality = .high
        context.draw(photo, in: CGRect(x: (SIZE.0 - width) / 2, y: (SIZE.0 - height) / 2, width: width, height: height))
    }
    return (0..<3).flatMap { channel in (0..<SIZE * SIZE).map { Float(rgba[4 * $0 + channel]) / 255 } }
}
```
"""

SECTIONS = {
    "executorch": """## ExecuTorch

```python
PREPARE
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
val input = Tensor.fromBlob(pixels(photo), longArrayOf(1, 3, SIZE, SIZE))
val logits = module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray
```

iOS (Swift package ExecuTorch: `executorch`, `backend_xnnpack`, `kernels_optimized`):

```swift
import ExecuTorch

let module = Module(filePath: path)
let input = Tensor<Float>(pixels(photo), shape: [1, 3, SIZE, SIZE])
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
val input = OnnxTensor.createTensor(environment, FloatBuffer.wrap(pixels(photo)), longArrayOf(1, 3, SIZE, SIZE))
val logits = (session.run(mapOf("images" to input))[0].value as Array<FloatArray>)[0]
```

iOS (pod `onnxruntime-objc`):

```swift
import onnxruntime_objc

let environment = try ORTEnv(loggingLevel: .warning)
let session = try ORTSession(env: environment, modelPath: path, sessionOptions: nil)
let values = pixels(photo)
let data = NSMutableData(bytes: values, length: 4 * values.count)
let input = try ORTValue(tensorData: data, elementType: .float, shape: [1, 3, SIZE, SIZE])
let output = try session.run(withInputs: ["images": input], outputNames: ["logits"], runOptions: nil)
let logits = (try output["logits"]!.tensorData() as Data).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
```
""",
    "torchscript": """## TorchScript (libtorch, Python)

```python
PREPARE
model = torch.jit.load("FILE")
with torch.no_grad():
    logits = model(torch.from_numpy(images))[0]
print(classes[logits.argmax()], logits.max().item())
```
""",
    "lite": """## PyTorch Mobile's lite interpreter

```python
PREPARE
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
val input = Tensor.fromBlob(pixels(photo), longArrayOf(1, 3, SIZE, SIZE))
val logits = module.forward(IValue.from(input)).toTensor().dataAsFloatArray
```

iOS (pod `LibTorch-Lite`) has no Swift interface. In Objective-C++, behind a bridging header:

```objectivec++
torch::jit::mobile::Module module = torch::jit::_load_for_mobile(path.UTF8String);
c10::InferenceMode guard;
at::Tensor input = torch::from_blob(values, {1, 3, SIZE, SIZE}, at::kFloat);
at::Tensor logits = module.forward({input}).toTensor();
```
""",
    "torch_export": """## torch.export

For PyTorch and for compilers that start there; phones do not read it. `torch.export.load` may unpickle: load files of
your own only.

```python
PREPARE
import torch.ao.quantization.fx._decomposed  # the operators of int8 files

model = torch.export.load("FILE").module()
with torch.no_grad():
    logits = model(torch.from_numpy(images))[0]
print(classes[logits.argmax()], logits.max().item())
```
""",
}
