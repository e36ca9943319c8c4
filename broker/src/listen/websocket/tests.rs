//! The stream, fed byte by byte with what RFC 6455 says.

use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};

use super::*;

const REQUEST: &str = "GET /mqtt HTTP/1.1\r\nHost: hub\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
                       Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

fn answered(request: &str, pages: Pages) -> Result<String, &'static str> {
    let mut buffer = BytesMut::from(request);
    answer(&mut buffer, pages)
        .map(|bytes| String::from_utf8(bytes).unwrap())
        .map_err(|rejected| rejected.status)
}

/// A masked frame, its header written out by hand.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = vec![first];
    match payload.len() {
        len @ 0..=125 => bytes.push(0x80 | len as u8),
        len @ 126..=0xffff => {
            bytes.push(0x80 | 126);
            bytes.extend_from_slice(&(len as u16).to_be_bytes());
        }
        len => {
            bytes.push(0x80 | 127);
            bytes.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(&mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

fn connected() -> (WebSocket<DuplexStream>, DuplexStream) {
    let (ours, theirs) = duplex(1024 * 1024);
    (WebSocket::new(ours, BytesMut::new()), theirs)
}

/// What a client sent comes to, and how the connection ended if it did not with the bytes.
async fn received(sent: &[u8]) -> (Vec<u8>, io::Result<()>, Vec<u8>) {
    let (mut stream, mut client) = connected();
    client.write_all(sent).await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = Vec::new();
    let end = stream.read_to_end(&mut got).await.map(drop);
    drop(stream);
    let mut answers = Vec::new();
    client.read_to_end(&mut answers).await.unwrap();
    (got, end, answers)
}

#[test]
fn an_upgrade_is_answered_as_the_standard_shows() {
    let ours =
        answered(&format!("{REQUEST}Sec-WebSocket-Protocol: mqttv3.1, mqtt\r\n\r\n"), Pages::All).unwrap();
    assert!(ours.starts_with("HTTP/1.1 101 "), "{ours}");
    // RFC 6455, 1.3
    assert!(ours.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{ours}");
    assert!(ours.contains("sec-websocket-protocol: mqtt\r\n"), "{ours}");
    let without = answered(&format!("{REQUEST}\r\n"), Pages::All).unwrap();
    assert!(!without.contains("protocol"), "{without}");
}

#[test]
fn each_wrong_request_is_told_so() {
    let status = |request: &str| answered(request, Pages::All).unwrap_err();
    let with = |extra: &str| format!("{REQUEST}{extra}\r\n");
    assert_eq!(status(&with("Sec-WebSocket-Protocol: mqttv3.1\r\n")), "400 Bad Request");
    assert_eq!(status(&with("").replace("/mqtt", "/chat")), "404 Not Found");
    assert_eq!(status(&with("").replace("GET", "POST")), "400 Bad Request");
    assert_eq!(status(&with("").replace("HTTP/1.1", "HTTP/1.0")), "400 Bad Request");
    assert_eq!(status(&with("").replace("Upgrade: websocket\r\n", "")), "426 Upgrade Required");
    assert_eq!(status(&with("").replace("Version: 13", "Version: 8")), "426 Upgrade Required");
    assert_eq!(status(&with("").replace("==", "=")), "400 Bad Request");
    assert_eq!(status("\r\n\r\n"), "400 Bad Request");
}

#[test]
fn without_users_only_pages_of_this_machine_are_let_in() {
    let from = |origin: &str| answered(&format!("{REQUEST}{origin}\r\n"), Pages::Local);
    for origin in
        ["", "Origin: http://localhost:8080\r\n", "Origin: https://127.0.0.1\r\n", "Origin: http://[::1]\r\n"]
    {
        assert!(from(origin).is_ok(), "{origin}");
    }
    for origin in ["http://evil.example", "http://localhost.evil.example", "null", "", "http://10.0.0.1"] {
        assert_eq!(from(&format!("Origin: {origin}\r\n")), Err("403 Forbidden"), "{origin}");
    }
    assert!(answered(&format!("{REQUEST}Origin: http://evil.example\r\n\r\n"), Pages::All).is_ok());
}

#[tokio::test]
async fn a_request_without_end_and_bytes_that_start_none_are_answered_and_held_no_longer() {
    let endless = [REQUEST.as_bytes(), &b"X: y\r\n".repeat(2000)[..]].concat();
    for (sent, status) in [(&endless[..], "431"), (b"\x10\x20\x00\x04MQTT", "400"), (b"GET\x00", "400")] {
        let (mut ours, mut client) = duplex(64 * 1024);
        client.write_all(sent).await.unwrap();
        let error = upgrade(&mut ours, Pages::All).await.unwrap_err();
        assert!(error.to_string().starts_with(status), "{error}");
        drop(ours);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[tokio::test]
async fn what_comes_together_with_the_request_is_not_lost() {
    let (mut ours, mut client) = duplex(64 * 1024);
    let sent = [REQUEST.as_bytes(), b"\r\n", &frame(0x82, b"early")].concat();
    client.write_all(&sent).await.unwrap();
    let early = upgrade(&mut ours, Pages::All).await.unwrap();
    let mut stream = WebSocket::new(ours, early);
    let mut got = [0; 5];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"early");
}

#[tokio::test]
async fn pings_are_answered_between_frames_and_the_standards_own_bytes_are_understood() {
    // RFC 6455, 5.7: a masked ping of "Hello", and the pong to it, unmasked.
    let ping = [0x89, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
    let sent = [&frame(0x02, b"ab")[..], &ping, &frame(0x80, b"cd"), &frame(0x88, &[3, 0xe8])].concat();
    let (got, end, answers) = received(&sent).await;
    assert_eq!((&got[..], end.is_ok()), (&b"abcd"[..], true));
    assert_eq!(answers, [&[0x8a, 0x05][..], b"Hello", &[0x88, 0x02, 0x03, 0xe8]].concat());
}

#[tokio::test]
async fn every_violation_ends_the_connection_with_its_code() {
    let code = |code: u16| [&[0x88, 0x02][..], &code.to_be_bytes()].concat();
    let unmasked = [0x82, 0x01, b'x'];
    let mut longest = frame(0x82, &[0; 70_000]);
    longest[2] = 0xff;
    for (sent, expected) in [
        (frame(0x81, b"text"), 1003),
        (unmasked.to_vec(), 1002),
        (frame(0xc2, b"x"), 1002),
        (frame(0x83, b"x"), 1002),
        (frame(0x80, b"x"), 1002),
        ([frame(0x02, b"x"), frame(0x82, b"x")].concat(), 1002),
        (frame(0x09, b"x"), 1002),
        (frame(0x89, &[0; 126]), 1002),
        (longest, 1002),
    ] {
        let (_, end, answers) = received(&sent).await;
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::InvalidData, "{:x?}", &sent[..6]);
        assert_eq!(answers, code(expected), "{:x?}", &sent[..6]);
    }
}

#[tokio::test]
async fn a_flood_of_pings_that_nobody_takes_the_answers_of_is_bounded() {
    let (ours, mut client) = duplex(256);
    let mut stream = WebSocket::new(ours, BytesMut::new());
    let reading = tokio::spawn(async move {
        let mut got = [0; 4];
        stream.read_exact(&mut got).await.unwrap();
        (got, stream.outgoing.staged.capacity())
    });
    for _ in 0..10_000 {
        client.write_all(&frame(0x89, &[7; 100])).await.unwrap();
    }
    client.write_all(&frame(0x82, b"MQTT")).await.unwrap();
    let (got, held) = reading.await.unwrap();
    assert_eq!(&got, b"MQTT");
    assert!(held <= 1024, "{held}");
}

#[tokio::test]
async fn a_frame_longer_than_memory_passes_through_in_pieces() {
    let (mut stream, mut client) = connected();
    let header = [0x82, 0xff, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    client.write_all(&header).await.unwrap();
    let mut piece = vec![7; 512 * 1024];
    for _ in 0..20 {
        client.write_all(&piece).await.unwrap();
        stream.read_exact(&mut piece).await.unwrap();
        assert!(piece.iter().all(|byte| *byte == 7));
    }
    assert!(stream.incoming.control.capacity() + stream.early.capacity() == 0);
}

#[tokio::test]
async fn what_is_sent_is_binary_and_ends_with_a_goodbye() {
    let (mut stream, mut client) = connected();
    stream.write_all(b"abc").await.unwrap();
    let large = vec![5; FRAME + 1];
    stream.write_all(&large).await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(stream.write_all(b"late").await.is_err());
    let mut sent = Vec::new();
    drop(stream);
    client.read_to_end(&mut sent).await.unwrap();
    let head = |len: usize| [&[0x82, 127][..], &(len as u64).to_be_bytes()].concat();
    let expected =
        [&[0x82, 3][..], b"abc", &head(FRAME), &large[1..], &[0x82, 1, 5], &[0x88, 2, 0x03, 0xe8]].concat();
    assert!(sent == expected, "{:x?}", &sent[..20]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn however_messages_are_cut_the_stream_is_the_same(
        pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..8),
        cuts in proptest::collection::vec(1..40usize, 1..20),
        finals in proptest::collection::vec(any::<bool>(), 8),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut sent = Vec::new();
        let mut goes_on = false;
        for (piece, last) in pieces.iter().zip(finals) {
            let opcode = if goes_on { 0 } else { 2 };
            sent.extend(frame(opcode | if last { 0x80 } else { 0 }, piece));
            goes_on = !last;
        }
        runtime.block_on(async {
            let (ours, mut client) = duplex(64);
            let mut stream = WebSocket::new(ours, BytesMut::new());
            let writing = async {
                let mut rest = &sent[..];
                for cut in cuts.iter().cycle() {
                    let (now, later) = rest.split_at((*cut).min(rest.len()));
                    client.write_all(now).await.unwrap();
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
                client.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (_, read) = tokio::join!(writing, stream.read_to_end(&mut got));
            prop_assert!(read.is_ok());
            prop_assert_eq!(got, pieces.concat());
            Ok(())
        })?;
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let _ = received(&bytes).await;
            let mut buffer = BytesMut::from(&bytes[..]);
            let _ = answer(&mut buffer, Pages::All);
        });
    }
}
