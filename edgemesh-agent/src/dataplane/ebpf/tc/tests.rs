use super::*;

#[test]
fn ports_are_those_that_the_kernel_gives_to_no_socket() {
    for (low, high, expected) in [
        (32_768, 60_999, [1024, 31_744]),
        (1024, 30_000, [30_001, 35_535]),
        (15_000, 65_535, [1024, 13_976]),
        (1024, 65_000, [1024, 64_512]),
        (0, 65_535, [1024, 64_512]),
    ] {
        assert_eq!(free_ports(low, high), expected, "{low} {high}");
    }
}

mod frame;
mod run;
