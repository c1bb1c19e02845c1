// `npm run test:peers [-- FILE …]`: our client against LMCache's server, and LMCache's and vLLM's clients against
// ours, all of them real, on the CPU. The first run installs them into .cache: twice 6 GB and ten minutes.

import { buildAddon, buildJavaScript } from "./build.mjs";
import { installLmcache, installVllm } from "./peers.mjs";
import { run, setup } from "./setup.mjs";

setup();
buildAddon();
buildJavaScript();
installLmcache();
installVllm();
const config = ["--config", "vitest.peers.config.ts"];
run("vitest", ["run", ...config, ...process.argv.slice(2)], { stdio: "inherit" });
