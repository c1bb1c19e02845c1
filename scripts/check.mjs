// Formatting, lints, types, licences and the API reference: everything that needs no test run.

import { buildAddon, buildJavaScript } from "./build.mjs";
import { installEngine } from "./engine.mjs";
import { checkLicences } from "./licences.mjs";
import { installOnnx, skipped } from "./onnx.mjs";
import { run, setup, step } from "./setup.mjs";

setup();
step("cargo fmt");
run("cargo", ["fmt", "--all", "--check"]);
step("cargo clippy");
run("cargo", [
	...["clippy", "--workspace", "--all-targets", "--locked", "--quiet"],
	...["--", "-D", "warnings"],
]);
step("licences");
checkLicences();
buildAddon(); // both write declarations that the types below rest on
buildJavaScript();
step("biome");
run("biome", ["check", "--error-on-warnings"]);
step("tsc");
run("tsc", ["--project", "."]);
installEngine();
run("tsc", ["--project", "examples/llama-chat"]); // kvferry's types against the engine's own
try {
	installOnnx();
	run("tsc", ["--project", "examples/onnx-chat"]);
} catch (error) {
	skipped("the types of onnxruntime-node", error);
}
step("typedoc");
run("typedoc", []);
console.error("\nall checks passed");
