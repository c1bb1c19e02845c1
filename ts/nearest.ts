/** The name among `known` that the fewest changed letters make of `name`. */
export function nearest(name: string, known: readonly string[]): string {
	const distances = known.map((other) => distance(name, other));
	return known[distances.indexOf(Math.min(...distances))] ?? "";
}

/** Levenshtein's: letters added, left out or replaced. */
function distance(from: string, to: string): number {
	let row = Array.from({ length: to.length + 1 }, (_, at) => at);
	for (const [above, letter] of [...from].entries()) {
		const next = [above + 1];
		for (const [at, other] of [...to].entries()) {
			const replaced = (row[at] ?? 0) + (letter === other ? 0 : 1);
			next.push(Math.min(replaced, (row[at + 1] ?? 0) + 1, (next[at] ?? 0) + 1));
		}
		row = next;
	}
	return row[to.length] ?? 0;
}
