//! Every case of the oracle vectors: what vLLM 0.33.0 and LMCache 0.5.6 themselves computed.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kvferry_core::hash::{
    BlockAlgorithm, BlockHasher, BlockHasherOptions, ChunkAlgorithm, ChunkHasher, ChunkStream,
    Lora, MmFeature, PromptEmbeds, Tokens,
};
use kvferry_core::{ErrorCode, Result};
use num_bigint::BigInt;
use serde_json::Value;

const BLOCK: &str = include_str!("../../../test/vectors/block_hash.json");
const CHUNK: &str = include_str!("../../../test/vectors/chunk_hash.json");
const WIRE: &str = include_str!("../../../test/wire/chunk_hash_vectors.json");

fn parse(file: &str) -> Value {
    serde_json::from_str(file).unwrap()
}

fn items(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn u32_at(case: &Value, field: &str) -> u32 {
    case[field].as_u64().unwrap().try_into().unwrap()
}

fn integers(tokens: &Value) -> Vec<BigInt> {
    items(tokens).iter().map(|id| id.to_string().trim_matches('"').parse().unwrap()).collect()
}

fn u32s(integers: &[BigInt]) -> Option<Vec<u32>> {
    integers.iter().map(|id| u32::try_from(id).ok()).collect()
}

/// Both paths over the same tokens, when both take them.
fn each_path(integers: &[BigInt], mut check: impl FnMut(Tokens<'_>)) {
    check(integers.into());
    if let Some(ids) = u32s(integers) {
        check(ids[..].into());
    }
}

fn block_hasher(case: &Value, algorithm: &str, block_size: u32) -> Result<BlockHasher> {
    let lora = &case["lora"];
    let embeds = &case["prompt_embeds"];
    let data = embeds.get("raw_hex").map(unhex);
    let element_bytes = match embeds["dtype"].as_str() {
        Some("float32") => 4,
        _ => 2, // float16 and bfloat16
    };
    BlockHasher::new(&BlockHasherOptions {
        block_size,
        algorithm: BlockAlgorithm::from_name(algorithm)?,
        seed: text(&case["PYTHONHASHSEED"]),
        cache_salt: text(&case["cache_salt"]),
        lora: text(&lora["name"]).map(|name| Lora { name, path: text(&lora["path"]).unwrap() }),
        mm_features: (case["mm_features"].as_array().into_iter().flatten())
            .map(|feature| {
                item(
                    feature["identifier"].as_str().unwrap(),
                    feature["offset"].as_i64().unwrap(),
                    u32_at(feature, "length"),
                )
            })
            .collect(),
        prompt_embeds: data.as_ref().map(|data| PromptEmbeds {
            data,
            bytes_per_token: u32::try_from(embeds["shape"][1].as_u64().unwrap()).unwrap()
                * element_bytes,
        }),
        num_hash_lookahead_tokens: case["lookahead"].as_u64().unwrap_or(0).try_into().unwrap(),
    })
}

fn item(identifier: &str, offset: i64, length: u32) -> MmFeature {
    MmFeature { identifier: identifier.to_owned(), offset, length }
}

/// The hashes of the blocks that `parts` complete, one after the other.
fn hashes(mut hasher: BlockHasher, parts: &[Tokens<'_>]) -> Vec<String> {
    let mut all = Vec::new();
    for part in parts {
        let mut room = vec![0; hasher.completes(part.len()) * hasher.hash_bytes()];
        let count = hasher.append(*part, &mut room).unwrap();
        assert_eq!(count * hasher.hash_bytes(), room.len());
        all.extend(room.chunks(hasher.hash_bytes()).map(hex));
    }
    all
}

#[test]
fn block_hashes_are_vllms() {
    let mut run = 0;
    for case in items(&parse(BLOCK)["cases"]) {
        let id = &case["id"];
        let given = case.get("token_ids_str").unwrap_or(&case["token_ids"]);
        let appended = integers(&case["append_tokens"]);
        let block_size = u32_at(case, "block_size");
        for (algorithm, expected) in case["block_hashes"].as_object().unwrap() {
            let expected: Vec<String> = items(expected).iter().map(|h| text(h).unwrap()).collect();
            let hasher = || block_hasher(case, algorithm, block_size).unwrap();
            each_path(&integers(given), |tokens| {
                let before = usize::try_from(u32_at(case, "num_blocks_before_append")).unwrap();
                assert_eq!(hashes(hasher(), &[tokens]), expected[..before], "{id} {algorithm}");
                let parts = [tokens, appended[..].into()];
                assert_eq!(hashes(hasher(), &parts), expected, "{id} {algorithm}");
            });
        }
        run += 1;
    }
    assert!(run >= 150, "{run}");
}

#[test]
fn the_first_parent_is_vllms_none_hash() {
    for case in items(&parse(BLOCK)["none_hash"]) {
        let hasher = block_hasher(case, text(&case["algo"]).unwrap().as_str(), 1);
        if case["random_seed"] == true {
            assert_eq!(hasher.unwrap_err().code, ErrorCode::InvalidArgument, "{case}");
            continue;
        }
        let first = hasher.unwrap();
        let mut resumed = first.clone();
        resumed.resume(&unhex(&case["none_hash"])).unwrap();
        let token = Tokens::U32(&[7]);
        assert_eq!(hashes(first, &[token]), hashes(resumed, &[token]), "{case}");
    }
}

#[test]
fn a_block_after_a_known_hash_is_vllms() {
    let mut run = 0;
    for case in items(&parse(BLOCK)["serialization_examples"]) {
        let tokens = integers(&case["token_ids"]);
        if !case["extra_keys"].is_null() || tokens.is_empty() {
            continue; // no request's block gives these
        }
        let size = u32::try_from(tokens.len()).unwrap();
        let mut hasher = block_hasher(case, text(&case["algo"]).unwrap().as_str(), size).unwrap();
        hasher.resume(&unhex(&case["parent_hex"])).unwrap();
        each_path(&tokens, |tokens| {
            assert_eq!(hashes(hasher.clone(), &[tokens]), [text(&case["hash"]).unwrap()], "{case}");
        });
        run += 1;
    }
    assert!(run >= 24, "{run}");
}

/// Recorded from `hashlib.sha256(pickle.dumps(…, protocol=5))` of CPython 3.11.7: the vectors stay
/// below 64 KiB, where pickle begins another frame.
#[test]
fn large_pickles_have_pythons_frames() {
    let pickled = |block_size, text: Option<&str>, tokens: Tokens<'_>| {
        let hasher = BlockHasher::new(&BlockHasherOptions {
            block_size,
            cache_salt: text.map(Into::into),
            lora: text.map(|text| Lora { name: text.into(), path: text.into() }),
            ..BlockHasherOptions::default()
        });
        hashes(hasher.unwrap(), &[tokens])
    };
    // The last block of one frame, and the first of two.
    for (count, hash) in [
        (13_099, "9cdf857a2cd01df9a864734a2d8e9bf8d63a1fb6ef355ee1f6a740a50d928431"),
        (13_100, "485b897a46394a13bb660091eb1b00374cecc875baedc2b505f7f536c84b8b83"),
    ] {
        let tokens: Vec<u32> = (0..count).map(|i| 65_536 + i).collect();
        assert_eq!(pickled(count, None, tokens[..].into()), [hash]);
    }
    // Every width of token, a text that Python shares, and a block after a split one.
    let tokens: Vec<u32> = (0..40_000_u32).map(|i| i.wrapping_mul(i).wrapping_mul(7919)).collect();
    assert_eq!(
        pickled(20_000, Some("x"), tokens[..].into()),
        [
            "16dbbcd520583c5f6df393125833db45bb73939ffdd6e0b4b835ce62250e0e27",
            "2df33be72907e6d3665869764f27cac1b5272de9dffabde1b41d327010672a33",
        ]
    );
    let tokens: Vec<BigInt> = (0..2_500)
        .map(|i| BigInt::from(3).pow(i % 2_000) * if i % 2 == 0 { 1 } else { -1 })
        .collect();
    assert_eq!(
        pickled(2_500, None, tokens[..].into()),
        ["45c70c9425ef1beeeb0156ef9869ddb83fa60589fe7136f9a408d4d43a152ccf"]
    );
    let two_to = |n| BigInt::from(2).pow(n);
    let edges = [
        BigInt::from(-1),
        BigInt::from(-128),
        BigInt::from(-129),
        -two_to(31),
        -two_to(31) - 1,
        two_to(31),
        -two_to(63),
        two_to(63),
        two_to(2039) - 1,
        two_to(2040),
        -two_to(2039) - 1,
    ];
    assert_eq!(
        pickled(11, None, edges[..].into()),
        ["22dc7ff29f58643bd6fd70063659373d796fb8f2d2daf4bdcdf27e758f8db18c"]
    );
}

/// Recorded from vLLM 0.33.0's functions: more objects than a byte can number, more than one frame,
/// and texts of which some are one object.
#[test]
fn a_block_of_many_items_is_vllms() {
    let hasher = BlockHasher::new(&BlockHasherOptions {
        block_size: 1500,
        cache_salt: Some("s".to_owned()),
        lora: Some(Lora { name: "a".to_owned(), path: "a".to_owned() }),
        mm_features: (0..3000)
            .map(|i: u32| {
                let short = char::from_u32(i % 200 + 1).unwrap().to_string();
                item(&if i.is_multiple_of(3) { short } else { format!("{i:064x}") }, i.into(), 1)
            })
            .collect(),
        num_hash_lookahead_tokens: 3,
        ..BlockHasherOptions::default()
    });
    let tokens: Vec<u32> = (0..3003_u32).map(|i| i.wrapping_mul(i).wrapping_mul(7919)).collect();
    assert_eq!(
        hashes(hasher.unwrap(), &[tokens[..].into()]),
        [
            "4f4f57d7227e7a23eeeed883688945693f4f9b11e63b30629ea2ac18a12be6a9",
            "7407f24c05fbd1681c4ce3c03c66d25eb1d200ae03c4a6d90468e869985ad63d",
        ]
    );
}

/// Recorded from vLLM 0.33.0's functions, which do not check the order that they assume.
#[test]
fn items_within_one_another_hash_as_in_vllm() {
    let hasher = BlockHasher::new(&BlockHasherOptions {
        block_size: 4,
        algorithm: BlockAlgorithm::Sha256Cbor,
        mm_features: vec![item("A1", 0, 12), item("B1", 2, 2), item("C1", 6, 3)],
        ..BlockHasherOptions::default()
    })
    .unwrap();
    let tokens: Vec<u32> = (0..12).collect();
    assert_eq!(
        hashes(hasher.clone(), &[tokens[..].into()]),
        [
            "22af667169428851b5e66e638599ac0a1b14633f6acba48779bba84289522c43",
            "a72634c19a9e14b0a59bebda53953935de808b3e1f016d07c81d8eb3da3d19d9",
            "fc0176b26ab1ab2b7b187f27c0b427de3d1e5d61f751bcb85822e991bc497fb7",
        ]
    );
    assert_eq!(
        hashes(hasher, &[tokens[..4].into(), tokens[4..].into()]),
        [
            "22af667169428851b5e66e638599ac0a1b14633f6acba48779bba84289522c43",
            "4b7a1052ffde8960ae65f9e3de5281474e904648fcf6b0fc27342b6c05edbe71",
            "a500f36969697b3aaf4cb3c93e32d562021d3973fe0a90bc94e7c230a1a3baf3",
        ]
    );
}

/// Requests with each kind of key and all of them together.
fn keyed_requests(mut check: impl FnMut(&BlockHasherOptions<'_>)) {
    let rows: Vec<u8> = (0..=255).cycle().take(70 * 3).collect();
    let features = [item("image", 3, 9), item("image", 12, 1), item("x", 20, 41), item("x", 90, 9)];
    for algorithm in ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"] {
        for kinds in 0..16 {
            let has = |kind: u32| kinds >> kind & 1 == 1;
            for lookahead in [0, 1, 2, 3, 20] {
                check(&BlockHasherOptions {
                    block_size: 8,
                    algorithm: BlockAlgorithm::from_name(algorithm).unwrap(),
                    seed: Some("1".to_owned()),
                    cache_salt: has(0).then(|| "s".to_owned()),
                    lora: has(1).then(|| Lora { name: "n".to_owned(), path: "n".to_owned() }),
                    mm_features: if has(2) { features.to_vec() } else { Vec::new() },
                    prompt_embeds: has(3)
                        .then_some(PromptEmbeds { data: &rows, bytes_per_token: 3 }),
                    num_hash_lookahead_tokens: lookahead,
                });
            }
        }
    }
}

/// Recorded from vLLM 0.33.0's functions: the last hash, which covers those before it. The last blocks
/// lie beyond the embeddings.
#[test]
fn all_keys_together_hash_as_in_vllm() {
    let recorded = [
        ("sha256", 0, "8a0c56666a946e2b188e0d9a3ac256bb2d11c11b938af5d42fb4addb021af25f"),
        ("sha256", 1, "17917dedfc251ff14eb8f06ab99591e39375d574e913fbec34ff35ff82e9020c"),
        ("sha256", 2, "45c616e7efb1c03cc4cda90ead0c4a15e2fcd2dc2f88f10fe85ce0a11857d453"),
        ("sha256", 3, "012895b0cc4b9720a635a59304bef996af236e13345c7cdab5e36ce393171b7c"),
        ("sha256", 20, "c13e9b0a450f7b5cbbdb43b830b2a5b5003db96af43facb681e3465aa49a42f0"),
        ("sha256_cbor", 0, "f58b283b634931ec42fa7c3ee4af86de0f4697b41ab17d2d856890a307027e15"),
        ("sha256_cbor", 1, "fd676bdf61ebd1d6f58cdbf7b0a64b0763c9809a53e6c32956bef1ae1fc9b16e"),
        ("sha256_cbor", 2, "e47d06a2da2a2cb3b135f86d95c0757b05e9de34f581033f5ce16424c2afe4da"),
        ("sha256_cbor", 3, "e4228c6f0d0ea127b342dce6b2d78733e303ab0cca8455589c1f50b4a75faeb4"),
        ("sha256_cbor", 20, "e9987fcb1ed2e087d138d018c08924fc7b411ca3f8752fdbba489f7ae68636cc"),
        ("xxhash", 0, "0230002aa458d87deff858e1ed9ac09f"),
        ("xxhash", 1, "8275aeb22615c8be6b45d41087beebba"),
        ("xxhash", 2, "6560edd777c44665579f8b56c2e905d0"),
        ("xxhash", 3, "a320c436b9c3a1586f69f497ca6d52ab"),
        ("xxhash", 20, "2de662031e3f2a41e830b9519ebf2b58"),
        ("xxhash_cbor", 0, "b4cc9f4da90ead1e58e1d198977cdd4b"),
        ("xxhash_cbor", 1, "7a2215182841f25a22da89a7475da362"),
        ("xxhash_cbor", 2, "cd1deed35a11d926f91542af2e18cc18"),
        ("xxhash_cbor", 3, "6130c79b6179a2f27a4d10e6c3c51940"),
        ("xxhash_cbor", 20, "5cc2ce6378a76c973a9371f3e9b084f5"),
    ];
    let tokens: Vec<u32> = (0..100).map(|i: u32| i.pow(4)).collect();
    let mut seen = 0;
    keyed_requests(|options| {
        let all = options.cache_salt.is_some()
            && options.lora.is_some()
            && !options.mm_features.is_empty()
            && options.prompt_embeds.is_some();
        if !all {
            return;
        }
        let (name, lookahead, last) = recorded[seen];
        assert_eq!(options.algorithm, BlockAlgorithm::from_name(name).unwrap());
        assert_eq!(options.num_hash_lookahead_tokens, lookahead);
        let hashes = hashes(BlockHasher::new(options).unwrap(), &[tokens[..].into()]);
        assert_eq!(hashes.last().unwrap(), last, "{name}, {lookahead} ahead");
        seen += 1;
    });
    assert_eq!(seen, recorded.len());
}

#[test]
fn a_request_in_parts_of_any_length_hashes_like_one() {
    let tokens: Vec<u32> = (0..100).map(|i: u32| i.pow(4)).collect();
    keyed_requests(|options| {
        let hasher = BlockHasher::new(options).unwrap();
        let whole = hashes(hasher.clone(), &[tokens[..].into()]);
        let lookahead = options.num_hash_lookahead_tokens as usize;
        assert_eq!(whole.len(), (100 - lookahead) / 8);
        for part in [1, 7, 8, 9, 40] {
            let parts: Vec<Tokens<'_>> = tokens.chunks(part).map(Into::into).collect();
            assert_eq!(hashes(hasher.clone(), &parts), whole, "{options:?} by {part}");
        }
    });
}

#[test]
fn a_request_goes_on_after_a_known_hash() {
    let tokens: Vec<u32> = (0..100).map(|i: u32| i.pow(4)).collect();
    keyed_requests(|options| {
        let mut hasher = BlockHasher::new(options).unwrap();
        let size = hasher.hash_bytes();
        let mut whole = vec![0; hasher.completes(100) * size];
        hasher.append(&tokens[..], &mut whole).unwrap();

        // Blocks 0 to 2 are known: what is left of the items and rows counts from token 24.
        let mut rest = options.clone();
        for feature in &mut rest.mm_features {
            feature.offset -= 24;
        }
        if let Some(embeds) = &mut rest.prompt_embeds {
            embeds.data = &embeds.data[24 * 3..];
        }
        let mut hasher = BlockHasher::new(&rest).unwrap();
        hasher.append(&[9; 5][..], &mut []).unwrap(); // forgotten with what it began
        hasher.resume(&whole[2 * size..3 * size]).unwrap();
        let expected: Vec<String> = whole.chunks(size).skip(3).map(hex).collect();
        assert_eq!(hashes(hasher, &[tokens[24..].into()]), expected, "{options:?}");
    });
}

#[test]
fn a_refused_call_changes_nothing() {
    let case = parse("{}");
    for lookahead in [0, 1] {
        let mut hasher = BlockHasher::new(&BlockHasherOptions {
            block_size: 2,
            algorithm: BlockAlgorithm::Sha256Cbor,
            num_hash_lookahead_tokens: lookahead,
            ..BlockHasherOptions::default()
        })
        .unwrap();
        let expected = hashes(hasher.clone(), &[Tokens::U32(&[1, 2, 3, 4, 5])]);
        assert_eq!(expected.len(), 2);
        hasher.append(&[1][..], &mut []).unwrap();
        let error = hasher.append(&[2, 3, 4, 5][..], &mut [0; 63]).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert_eq!(hasher.resume(&[0; 16]).unwrap_err().code, ErrorCode::InvalidArgument);
        assert_eq!(hashes(hasher, &[Tokens::U32(&[2, 3, 4, 5])]), expected);
    }

    assert!(block_hasher(&case, "sha256_cbor", 0).is_err());
    assert!(BlockAlgorithm::from_name("md5").is_err());
    let long = parse(&format!(r#"{{"cache_salt":"{}"}}"#, "x".repeat(4097)));
    assert!(block_hasher(&long, "sha256", 16).is_err());
}

#[test]
fn keys_that_cannot_be_are_refused() {
    let refused = |options: BlockHasherOptions<'_>| {
        let error = BlockHasher::new(&options).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        error.message
    };
    let long = item(&"x".repeat(4097), 0, 1);
    let message =
        refused(BlockHasherOptions { mm_features: vec![long], ..BlockHasherOptions::default() });
    assert!(message.contains("identifier") && message.contains("4097"), "{message}");
    for (bytes_per_token, part) in [(0, "0 bytes per token"), (4, "6 bytes"), (7, "6 bytes")] {
        let embeds = PromptEmbeds { data: &[0; 6], bytes_per_token };
        let message = refused(BlockHasherOptions {
            prompt_embeds: Some(embeds),
            ..BlockHasherOptions::default()
        });
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn extreme_keys_are_taken() {
    let tokens = [1, 2, 3, 4];
    let hash = |mm_features, lookahead| {
        let hasher = BlockHasher::new(&BlockHasherOptions {
            block_size: 2,
            mm_features,
            num_hash_lookahead_tokens: lookahead,
            ..BlockHasherOptions::default()
        });
        hashes(hasher.unwrap(), &[Tokens::U32(&tokens)])
    };
    let plain = hash(Vec::new(), 0);
    // Items that no token belongs to, yet or any more.
    assert_eq!(hash(vec![item("image", i64::MAX, u32::MAX)], 0), plain);
    assert_eq!(hash(vec![item("image", i64::MIN, u32::MAX)], 0), plain);
    assert_eq!(hash(Vec::new(), u32::MAX).len(), 0);
}

#[test]
fn chunk_hashes_are_lmcaches() {
    for case in items(&parse(CHUNK)["cases"]) {
        let id = &case["id"];
        let algorithm =
            ChunkAlgorithm::from_name(case["hash_algorithm"].as_str().unwrap()).unwrap();
        let chunk_size = u32_at(case, "chunk_size");
        let hasher = ChunkHasher::new(algorithm, chunk_size).unwrap();
        let mut stream = ChunkStream::new(&hasher);
        if !case["prefix_hash_hex"].is_null() {
            stream.resume(&unhex(&case["prefix_hash_hex"])).unwrap();
        }
        // LMCache hashes from token 0 to `end` and leaves out what begins before `start`.
        let mut tokens = integers(&case["token_ids"]);
        if let Some(end) = case["end"].as_u64() {
            tokens.truncate(end.try_into().unwrap());
        }
        let start: usize = case["start"].as_u64().unwrap().try_into().unwrap();
        let skip = start.div_ceil(chunk_size as usize);

        each_path(&tokens, |tokens| {
            let mut stream = stream.clone();
            let mut room = vec![0; stream.completes(tokens.len()) * 32];
            let result = stream.append(tokens, &mut room);
            if case.get("error").is_some() {
                let error = result.unwrap_err();
                assert_eq!(error.code, ErrorCode::InvalidToken, "{id}");
                assert!(error.message.contains("position 0"), "{id}: {error}");
                return;
            }
            let hashes: Vec<Value> = room.chunks(32).skip(skip).map(|h| hex(h).into()).collect();
            assert_eq!(hashes, items(&case["chunk_hashes_hex"]), "{id}");
        });
        if let (Some(ids), true) = (u32s(&tokens), case["prefix_hash_hex"].is_null()) {
            let mut hashes = Vec::new();
            hasher.extend(&mut hashes, &ids);
            let hashes: Vec<Value> = hashes.iter().skip(skip).map(|h| hex(h).into()).collect();
            assert_eq!(hashes, items(&case["chunk_hashes_hex"]), "{id}");
        }
    }
}

#[test]
fn chunk_hashes_are_those_of_the_recorded_server() {
    for case in items(&parse(WIRE)["vectors"]) {
        let hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, u32_at(case, "chunk_size")).unwrap();
        let mut hashes = Vec::new();
        hasher.extend(&mut hashes, &u32s(&integers(&case["tokens"])).unwrap());
        let hashes: Vec<Value> = hashes.iter().map(|h| hex(h).into()).collect();
        assert_eq!(hashes, items(&case["hashes"]));
    }
}
