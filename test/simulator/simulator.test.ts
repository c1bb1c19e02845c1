import { execFile } from "node:child_process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { describe, expect, it } from "vitest";

const SCRIPT = fileURLToPath(new URL("../../scripts/simulate.mjs", import.meta.url));

async function simulate(...args: string[]): Promise<{ code: number; output: string }> {
	try {
		const { stdout } = await promisify(execFile)(process.execPath, [SCRIPT, "--no-build", ...args]);
		return { code: 0, output: stdout };
	} catch (error) {
		const { code, stdout, stderr } = error as { code: number; stdout: string; stderr: string };
		return { code, output: stdout + stderr };
	}
}

describe("the simulator", () => {
	it("replays a seed exactly, and in a run of many seeds too", async () => {
		const [first, second] = await Promise.all([simulate("--seed", "11"), simulate("--seed", "11")]);
		const facts = (output: string) => output.split("\n")[0];
		expect(first.output).toContain("no violation");
		expect(facts(second.output)).toBe(facts(first.output));
		const failing = await simulate("--seed", "1", "--requests", "16000", "--defect", "SumForMax");
		expect(failing.code).toBe(1);
		const seed = /npm run simulate -- --seed (\d+)/.exec(failing.output)?.[1] as string;
		const replayed = await simulate("--seed", seed, "--defect", "SumForMax");
		const message = /seed \d+, tick .*/.exec(failing.output)?.[0];
		expect(replayed.output).toContain(message);
	}, 120_000);

	it("notices each deliberate defect within a minute", async () => {
		const { code, output } = await simulate("--defects");
		expect(output).not.toContain("not noticed");
		expect(output.match(/: noticed in/g)?.length).toBeGreaterThanOrEqual(10);
		expect(code).toBe(0);
	}, 900_000);

	it("makes everything happen that it is there for", async () => {
		const { output } = await simulate("--seed", "1", "--requests", "8000");
		const facts = (output.split("\n")[0] as string).split(", ");
		const never = facts.filter((fact) => fact.startsWith("0 "));
		expect([facts.length > 15, never]).toEqual([true, ["0 failed calls"]]);
	}, 120_000);

	it("finds nothing wrong when KV memory is a GPU's, by the fake driver", async () => {
		const { output } = await simulate("--seed", "1", "--requests", "800", "--cuda");
		expect(output).toContain("800 requests simulated over 2 seeds from 1 with CUDA");
		expect(output).toContain("no violation");
	}, 120_000);

	it("refuses what it does not know", async () => {
		expect((await simulate("--defect", "Nonsense")).output).toMatch(
			/there is no defect "Nonsense"/,
		);
		expect((await simulate("--seed", "x")).output).toMatch(/--seed is x/);
	}, 60_000);
});
