//! The parameters of a request's query, which may come more than once.

use percent_encoding::percent_decode_str;

/// Names and values in the order they come; what is not UTF-8 after decoding is shown with replacements.
pub fn parameters(query: &str) -> impl Iterator<Item = (String, String)> {
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
    };
    query.split('&').filter(|pair| !pair.is_empty()).map(move |pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_decoded_and_as_often_as_they_are_said() {
        let found: Vec<_> = parameters("a=1&b=x%2Cy+z&a=2&&c&%ff=%3D").collect();
        let expected = [("a", "1"), ("b", "x,y z"), ("a", "2"), ("c", ""), ("\u{fffd}", "=")];
        assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(parameters("").count(), 0);
    }
}
